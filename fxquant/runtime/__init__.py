"""Execution of quantized graphs and the artefact they are kept in."""
