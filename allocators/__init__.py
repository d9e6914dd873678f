"""Bit allocation as numbers: a `CostTable` and a `Budget` in, an `Allocation` out; no torch, no graphs."""
