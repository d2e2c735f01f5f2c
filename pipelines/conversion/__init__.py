"""Writes the formats that `pipelines.storage` reads."""
