"""Reads files that torch.save or pickle wrote without running code from them."""
