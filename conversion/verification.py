"""Proving that a packed checkpoint is what it claims to be."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_model
from conversion.errors import InputError
from conversion.packed import pack24, unpack24
from conversion.packed_checkpoint import PackedCheckpoint, load_packed
from conversion.shards import tensor_bytes

LOGITS_TOKENS = 32


@dataclass(frozen=True)
class VerifyReport:
    """What was checked; every check that fails raises instead.

    Attributes:
        sparse_layers: linears found exactly 2:4, with intact bitmasks and SHA-256.
        dense_tensors: other tensors, with intact SHA-256.
        compared_with: the dense model whose tensors equal the unpacked ones bit for bit (quantized weights: whose
            zeros are theirs); None if none was given.
        logits_tokens: tokens whose logits are equal bit for bit between packed and dense model; 0 if not compared.
        rounding_error: the largest ||W - Q|| / ||W|| (Frobenius) of a quantized weight; None if there is none or it was
            not compared.
    """

    sparse_layers: int
    dense_tensors: int
    compared_with: str | None
    logits_tokens: int
    rounding_error: float | None = None

    def __str__(self) -> str:
        checked = (
            f"{self.sparse_layers} linears are exactly 2:4 and intact, {self.dense_tensors} dense tensors are intact"
        )
        if self.compared_with is None:
            return f"{checked}; not compared with a source model"
        if self.rounding_error is not None:
            return (
                f"{checked}; weights that are not quantized equal {self.compared_with} bit for bit, and quantized ones "
                f"keep its zeros and differ by at most {self.rounding_error:.2%} of a weight's norm"
            )
        return f"{checked}; they and the logits of {self.logits_tokens} tokens equal {self.compared_with} bit for bit"


def verify(packed_dir: str | Path, source_dir: str | Path | None = None) -> VerifyReport:
    """Check a packed checkpoint, alone or against the dense model it was made from.

    Alone: headers, SHA-256 of every tensor, bitmasks, and that unpacking and packing again changes nothing. With
    `source_dir` also: every unpacked weight equals the source's (rounded to the value dtype), every other tensor is
    equal bit for bit, and the unpacked model's logits equal those of the source. Quantized weights must instead have
    zeros where the source has, and an error smaller than themselves; no logits are then compared. Holds one dense model
    at a time.

    Raises:
        InputError: the first check that fails, naming the tensor.
    """
    packed = load_packed(packed_dir)
    source = None if source_dir is None else Checkpoint(source_dir)
    if source is not None:
        _check_same_names(packed, source)
    errors = []
    for layer in packed.sparse_layers:
        name = f"{layer}.weight"
        weight = packed.linear_weight(name)
        if not torch.equal(unpack24(*pack24(weight)), weight):
            raise InputError(
                f"layer '{layer}' of {packed.directory} does not survive packing again: convert the model again"
            )
        if source is not None and packed.quantization is None:
            _check_layer(packed, source, layer, weight)
        elif source is not None:
            errors.append(_check_quantized(packed, source, name, weight, source.linear_weight(name)))
    dense = [name for name in packed.names if name not in set(packed.scope)]
    for name in dense:
        tensor = packed.tensor(name)
        if source is not None and name.removesuffix(".weight") in packed.quantized_embeddings:
            errors.append(_check_quantized(packed, source, name, tensor, source.tensor(name)))
        elif source is not None and tensor_bytes(tensor) != tensor_bytes(source.tensor(name)):
            raise _differs(name, packed, source)
    compare_logits = source is not None and packed.quantization is None and packed.embedding is None
    if source is not None and compare_logits:
        _check_logits(packed, source)
    return VerifyReport(
        sparse_layers=len(packed.sparse_layers),
        dense_tensors=len(dense),
        compared_with=None if source is None else str(source.directory),
        logits_tokens=LOGITS_TOKENS if compare_logits else 0,
        rounding_error=max(errors, default=None),
    )


def _check_same_names(packed: PackedCheckpoint, source: Checkpoint) -> None:
    different = sorted(set(packed.names) ^ set(source.names) | set(packed.scope) ^ set(source.scope))
    if different:
        raise InputError(
            f"tensor '{different[0]}' is not stored alike in {packed.directory} and {source.directory}: "
            "name the model it was packed from"
        )


def _check_layer(packed: PackedCheckpoint, source: Checkpoint, layer: str, weight: Tensor) -> None:
    expected = source.linear_weight(f"{layer}.weight").to(packed.value_dtype)
    if expected.shape != weight.shape or not torch.equal(weight, expected):
        raise _differs(f"{layer}.weight", packed, source)


def _check_quantized(
    packed: PackedCheckpoint, source: Checkpoint, name: str, weight: Tensor, expected: Tensor
) -> float:
    """Return ||W - Q|| / ||W||."""
    expected = expected.float()
    if expected.shape != weight.shape or (weight[expected == 0] != 0).any():
        raise _differs(name, packed, source)
    error = torch.linalg.norm(weight - expected).item() / max(torch.linalg.norm(expected).item(), 1e-30)
    if error >= 1:
        raise _differs(name, packed, source)
    return error


def _differs(name: str, packed: PackedCheckpoint, source: Checkpoint) -> InputError:
    return InputError(f"tensor '{name}' of {packed.directory} differs from {source.directory}: convert the model again")


def _check_logits(packed: PackedCheckpoint, source: Checkpoint) -> None:
    """Compare logits of fixed random tokens; the source's linears are rounded to the value dtype first."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(packed.config["vocab_size"], (1, LOGITS_TOKENS), generator=generator)
    dtype = torch.promote_types(packed.dtype, source.dtype)
    with torch.inference_mode():
        ours = _aligned(dense_model(packed, dtype))(tokens).logits
        theirs = _aligned(dense_model(source, dtype, linear_dtype=packed.value_dtype))(tokens).logits
    if not ours.isfinite().all() or not torch.equal(ours, theirs):
        raise InputError(
            f"the logits of {packed.directory} differ from those of {source.directory}: convert the model again"
        )


def _aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Move weights that lie in a mapped file into memory of torch's alignment, on which its sums' order depends."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
