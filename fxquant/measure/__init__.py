"""What a compiled model does in fact: accuracy on images, time on this machine."""
