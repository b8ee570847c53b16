"""2:4 sparse linear layers on NVIDIA GPUs, sm_80 and newer.

`layout` brings a packed weight into the order that the kernels read, `small_m` and `tiled` cut a call into blocks,
for few and for many rows of x, `source` puts the kernels' source together, `crossover` knows which one to take.
"""
