"""Detectors with Vision Transformers in them: built, quantized as one model under one budget, and measured by AP."""
