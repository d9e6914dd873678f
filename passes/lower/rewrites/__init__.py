"""Rewrites of a lowered graph: what is computed stays the same, in fewer calls."""
