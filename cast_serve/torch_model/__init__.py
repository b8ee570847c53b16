"""A packed checkpoint as a transformers model whose sparse linears run the 2:4 kernels."""
