"""The 2:4 kernels against dense linears, layer by layer."""
