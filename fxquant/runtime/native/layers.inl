// All that a set of kernels runs, on the tile and the vectors that it has.

#include "elementwise.inl"
#include "epilogue.inl"
#include "reach.inl"
#include "linear.inl"
#include "product.inl"
#include "attention.inl"
