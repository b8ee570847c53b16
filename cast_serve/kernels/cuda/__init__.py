"""2:4 sparse linear layers on NVIDIA GPUs, sm_80 and newer.

`layout` brings a packed weight into the order that the kernels read, `small_m` cuts a call into blocks.
"""
