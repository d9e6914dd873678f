"""Integer kernels: C++ behind a C interface, and the torch operators that call them."""
