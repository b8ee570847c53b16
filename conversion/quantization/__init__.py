"""Quantized kept values: number formats and scales, rounding with and without calibration text.

Formats are in `formats`, the choice of scales in `scales`, rounding with error feedback in `gptq` and `descent`, and
`quantize` puts them together for one weight and for a whole model.
"""
