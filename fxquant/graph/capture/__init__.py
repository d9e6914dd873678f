"""From a caller's model to a graph in one form: tracing, and the rewrites that normalize it."""
