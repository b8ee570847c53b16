"""A packed checkpoint as a transformers model whose sparse linears run the CPU kernels."""
