"""Weights and scales that make up for quantization: rounding, closed forms, reconstruction, training."""
