"""Quantized modules in the place of float ones."""
