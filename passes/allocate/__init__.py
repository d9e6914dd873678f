"""From scores to bits: what a layer's widths cost, and which it gets."""
