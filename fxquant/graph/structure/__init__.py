"""What a graph is made of: roles, blocks, paths of channels, heads."""
