"""What is quantized, what is seen there, and the quantizers that lose least."""
