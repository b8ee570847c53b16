"""The panels that an export writes are those that the kernel library packs."""

import pytest
import torch

from cast_serve.kernels import prepack_quantized
from conversion.quantization.formats import Quantization
from conversion.quantized_panel import panel_group, to_quantized_panels
from tests.cast_serve.test_quantized_kernels import FORMATS, quantized_layer


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("quantization", FORMATS, ids=lambda q: f"{q.values.name}-{q.group_size}")
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (33, 40), (80, 576)])
def test_panels_agree_byte_for_byte(rows: int, columns: int, quantization: Quantization, sparse: bool) -> None:
    stored, bitmask, scale, _ = quantized_layer(rows, columns, quantization, sparse=sparse)
    packed, bits, group = prepack_quantized(stored, bitmask, scale, quantization.group_size)
    assert (bits, group) == (quantization.values.bits, panel_group(quantization))
    assert torch.equal(to_quantized_panels(stored, bitmask, scale, quantization), packed)
