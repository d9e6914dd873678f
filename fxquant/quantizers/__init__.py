"""Quantizers, the statistics they are chosen by and the search that chooses."""
