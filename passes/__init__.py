"""Passes over a traced graph, one verb a module, and the pipelines they make."""
