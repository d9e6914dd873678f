"""Calibration images made from the model itself."""
