"""Quantizing one weight, and every linear of a model behind the blocks already quantized."""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from conversion.block_walk import input_grams
from conversion.drift import drifting_inputs
from conversion.hessian import damped, fit_kept
from conversion.quantization.descent import refine
from conversion.quantization.formats import Quantization, encode
from conversion.quantization.gptq import gptq
from conversion.quantization.scales import fit_scales

ROWS_AT_ONCE = 8192


def quantize_weight(
    weight: Tensor, mask: Tensor, quantization: Quantization, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes [N, K], 0 where masked, and scales [N, G], float32.

    Args:
        weight: [N, K] float32, masked entries zero.
        mask: [N, K] bool, True where kept; all True quantizes a dense weight.
        quantization: format and groups.
        gram: X^T X [K, K] of the layer's inputs, for error feedback; None rounds to nearest.
    """
    hessian = None if gram is None else damped(gram)
    scale = fit_scales(weight, quantization, None if hessian is None else hessian.diagonal())
    each = quantization.spread(scale, weight.shape[1])
    if hessian is None:
        return quantization.values.round(weight / each), scale
    codes = gptq(weight, mask, hessian, each, quantization.values)
    return refine(codes, weight, mask, hessian, each, quantization.values), scale


@torch.no_grad()
def quantize_dense(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Round a dense weight [N, K] to nearest; return it as stored (see `encode`) and its scales [N, G].

    Rows go in pieces, so that of a large embedding no float32 copy is made.
    """
    stored, scales = [], []
    for rows in weight.split(ROWS_AT_ONCE):
        codes, scale = quantize_weight(rows.float(), torch.ones_like(rows, dtype=torch.bool), quantization)
        stored.append(encode(codes, quantization.values))
        scales.append(scale)
    return torch.cat(stored), torch.cat(scales)


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel,
    linears: Collection[nn.Module],
    quantization: Quantization,
    calibration: Tensor | None,
    *,
    sparse: bool,
) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Quantize `linears` in place, block by block; yield each with its codes [N, K] and scales [N, G].

    On calibration text each makes up for its own rounding; with fewer than 8 bits also for what those before it did to
    its inputs (as GPTAQ, arXiv:2504.02692), which takes twice as long and would find little to do at 8.

    Args:
        model: float32.
        linears: modules to quantize, `nn.Linear` or GPT-2's `Conv1D`.
        quantization: format and groups.
        calibration: int64 token ids [samples, length]; None rounds to nearest.
        sparse: keep zero weights at zero (a 2:4 model); else every weight may move.
    """
    description = f"{quantization.values.name}: quantizing blocks"
    if calibration is None:
        for linear in linears:
            yield linear, *_quantize(linear, quantization, sparse)
    elif quantization.values.bits < 8:
        for inputs in drifting_inputs(model, linears, calibration, description):
            for linear in inputs.linears:
                yield linear, *_quantize(linear, quantization, sparse, inputs.gram, inputs.corrected)
    else:
        for grams in input_grams(model, linears, calibration, description):
            for linear, gram in grams.items():
                yield linear, *_quantize(linear, quantization, sparse, gram)


def _quantize(
    linear: nn.Module,
    quantization: Quantization,
    sparse: bool,
    gram: Tensor | None = None,
    corrected: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    stored = linear.weight
    assert isinstance(stored, Tensor)
    weight = stored.T if isinstance(linear, Conv1D) else stored
    mask = weight != 0 if sparse else torch.ones_like(weight, dtype=torch.bool)
    wanted = weight if corrected is None else corrected(weight)
    if sparse and corrected is not None and gram is not None:
        wanted = fit_kept(weight, wanted, damped(gram))
    codes, scale = quantize_weight(wanted, mask, quantization, gram)
    weight.copy_(codes * quantization.spread(scale, codes.shape[1]))
    return codes, scale
