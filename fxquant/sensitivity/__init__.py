"""Metrics of how much a layer suffers from low bits, beside those the scale search yields."""
