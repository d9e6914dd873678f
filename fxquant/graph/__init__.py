"""Tracing, roles and annotations: what every pass knows about a graph."""
