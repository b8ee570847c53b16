"""Weight scaling: gives a layer back the output that decay takes from it (CAST, Eq. 11-12, Algorithm 2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conversion.errors import InputError


class ScaledLinear(nn.Module):
    """A linear layer whose forward uses W'[r, c] = A[r, c // (C/n)] * W[r, c]: n column blocks per output row.

    Takes the place of an nn.Linear or of GPT-2's Conv1D and keeps its parameters under their names; `scale` is the new
    one. Mask and decay see `weight` itself. At n = 2 the extra pass over the weights costs less than scaling the two
    half-products, measured at 512 tokens.

    Attributes:
        weight: [R, C], or [C, R] if transposed; the layer's own Parameter.
        scale: [R, n] float32, the paper's A, ones at first.
        bias: [R] or None, not scaled.
        transposed: True for a Conv1D, which stores [in, out].
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear | Conv1D, blocks: int = 2) -> None:
        """InputError if the input size C is not divisible by `blocks`."""
        super().__init__()
        self.transposed = isinstance(linear, Conv1D)
        self.weight = linear.weight
        self.bias = linear.bias
        in_features, out_features = self.weight.shape if self.transposed else self.weight.shape[::-1]
        if blocks < 1 or in_features % blocks:
            raise InputError(f"a layer with {in_features} inputs has no {blocks} equal scaling blocks: use 1 or 2")
        self.scale = nn.Parameter(torch.ones(out_features, blocks, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., R], in the autocast dtype if autocast is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _ScaledMatmul.apply(x, self.weight, self.scale, self.transposed)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def fold(self) -> nn.Linear | Conv1D:
        """Return the plain layer that computes the same; it takes over and overwrites `weight`."""
        self.weight.copy_(_scaled(self.weight, self.scale, self.transposed, self.weight.dtype))
        plain: nn.Linear | Conv1D
        if self.transposed:
            in_features, out_features = self.weight.shape
            plain = Conv1D(out_features, in_features)
        else:
            out_features, in_features = self.weight.shape
            plain = nn.Linear(in_features, out_features, bias=self.bias is not None, device="meta")
        plain.weight = self.weight
        plain.bias = self.bias  # type: ignore[assignment]
        return plain


def _blocks(weight: Tensor, scale: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """View the weight with its input axis split in n blocks, and the scale so that it broadcasts over that."""
    n = scale.shape[1]
    if transposed:
        return weight.view(n, -1, weight.shape[1]), scale.t().unsqueeze(1)
    return weight.view(weight.shape[0], n, -1), scale.unsqueeze(2)


def _scaled(weight: Tensor, scale: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """Return A * W in `dtype`, scaled and cast in one pass."""
    scaled = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    torch.mul(*_blocks(weight, scale, transposed), out=_blocks(scaled, scale, transposed)[0])
    return scaled


class _ScaledMatmul(torch.autograd.Function):
    """y = x @ (A * W)^T in x's dtype; the gradients of W and A share one product, in W's dtype.

    A * W is made again in the backward pass: kept, it would take as much memory as the whole model in that dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, transposed: bool) -> Tensor:
        scaled = _scaled(weight, scale, transposed, x.dtype)
        ctx.save_for_backward(x, weight, scale)
        ctx.transposed = transposed
        return x @ scaled if transposed else F.linear(x, scaled)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        (grad_y,) = grad_outputs
        transposed: bool = ctx.transposed
        grad_x = grad_weight = grad_scale = None
        if ctx.needs_input_grad[0]:
            scaled = _scaled(weight, scale, transposed, x.dtype)
            grad_x = F.linear(grad_y, scaled) if transposed else grad_y @ scaled
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            x_2d, grad_y_2d = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
            # dL/dW', turned into dL/dW in place after dL/dA has been read off it
            grad_weight = (x_2d.t() @ grad_y_2d if transposed else grad_y_2d.t() @ x_2d).to(weight.dtype)
            blocks, broadcast_scale = _blocks(grad_weight, scale, transposed)
            products = blocks * _blocks(weight, scale, transposed)[0]
            grad_scale = (products.sum(1).t() if transposed else products.sum(2)).to(scale.dtype)
            blocks.mul_(broadcast_scale)
        return grad_x, grad_weight, grad_scale, None
