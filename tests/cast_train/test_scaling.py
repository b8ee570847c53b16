"""Weight scaling against Eq. 11 written out with indices, in float64."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cast_train.scaling import ScaledLinear
from conversion.errors import InputError

IN, OUT = 24, 10


def layer(kind: str, bias: bool = True) -> nn.Linear | Conv1D:
    linear = nn.Linear(IN, OUT, bias=bias) if kind == "linear" else Conv1D(OUT, IN)
    nn.init.normal_(linear.weight)
    if linear.bias is not None:
        nn.init.normal_(linear.bias)
    return linear.double()


def scaled_weight(weight_RC: Tensor, scale_Rn: Tensor) -> Tensor:
    """W'[r, c] = A[r, c // (C/n)] * W[r, c]"""
    width = weight_RC.shape[1] // scale_Rn.shape[1]
    return torch.stack([scale_Rn[:, c // width] * weight_RC[:, c] for c in range(weight_RC.shape[1])], dim=1)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_forward_and_gradients(kind: str, blocks: int) -> None:
    torch.manual_seed(0)
    plain = layer(kind)
    scaled = ScaledLinear(plain, blocks).double()
    nn.init.uniform_(scaled.scale, 0.5, 2.0)
    x = torch.randn(3, 5, IN, dtype=torch.float64, requires_grad=True)
    x_ref, weight_ref, scale_ref = (t.detach().clone().requires_grad_() for t in (x, scaled.weight, scaled.scale))
    weight_RC = weight_ref.t() if kind == "conv1d" else weight_ref
    expected = x_ref @ scaled_weight(weight_RC, scale_ref).t() + plain.bias
    torch.testing.assert_close(scaled(x), expected)
    upstream = torch.randn(3, 5, OUT, dtype=torch.float64)
    scaled(x).backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, x_ref.grad)
    torch.testing.assert_close(scaled.weight.grad, weight_ref.grad)
    torch.testing.assert_close(scaled.scale.grad, scale_ref.grad)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_starts_as_the_plain_layer_and_folds_into_one(kind: str) -> None:
    torch.manual_seed(0)
    plain = layer(kind)
    x = torch.randn(4, IN, dtype=torch.float64)
    before = plain(x)
    scaled = ScaledLinear(plain).double()
    assert scaled.weight is plain.weight
    torch.testing.assert_close(scaled(x), before)
    nn.init.uniform_(scaled.scale, -2.0, 2.0)
    expected = scaled(x)
    folded = scaled.fold()
    assert type(folded) is type(plain)
    assert sorted(folded.state_dict()) == ["bias", "weight"]
    torch.testing.assert_close(folded(x), expected)


def test_runs_in_the_autocast_dtype_with_float32_gradients() -> None:
    torch.manual_seed(0)
    scaled = ScaledLinear(nn.Linear(IN, OUT, bias=False))
    x = torch.randn(4, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = scaled(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == scaled.weight.grad.dtype == scaled.scale.grad.dtype == torch.float32
    torch.testing.assert_close(scaled.weight.grad, x.detach().sum(0).expand(OUT, IN), rtol=0.02, atol=0.02)


def test_refuses_unequal_blocks() -> None:
    with pytest.raises(InputError, match="24 inputs"):
        ScaledLinear(nn.Linear(24, 8), 5)
