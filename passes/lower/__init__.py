"""From a simulated graph to one that computes on integers."""
