"""What observers gather of a tensor: histograms, Gram matrices in low rank, outlier channels."""
