"""Renders results as Markdown tables."""
