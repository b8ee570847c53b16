"""Export a 2:4 model for ONNX Runtime's TensorRT provider, which has 2:4 tensor cores of its own to offer.

The graph has standard operators alone, so that TensorRT takes all of it. Weights are stored dense, zeros included:
TensorRT looks for 2:4 in them when it builds its engine, with `trt_sparsity_enable`. Whole sequences in, their logits
out, no cache: for scoring, reading prompts and embeddings, which is where tensor cores decide.
"""

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conversion.atomic import new_directory
from conversion.checkpoint import Checkpoint
from conversion.dense_model import context_length, dense_model
from conversion.errors import InputError
from conversion.onnx.export_model import MODEL, copy_companions
from conversion.packed_checkpoint import PackedCheckpoint, open_checkpoint

PROVIDERS = "providers.json"
"""Options by provider, for `onnxruntime.InferenceSession(..., providers=list(these.items()))`."""
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Logits(nn.Module):
    """input_ids, attention_mask [B, S] int64 -> logits [B, S, V]."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def export_tensorrt(
    source_dir: str | Path, out_dir: str | Path, value_dtype: str | None = None, *, overwrite: bool = False
) -> None:
    """Export a 2:4 Hugging Face model directory, packed or dense-stored.

    Holds the dense model in memory twice. Needs the extra `tensorrt`.

    Args:
        source_dir: packed checkpoint without quantized values, or dense-stored 2:4 model.
        out_dir: appears complete or not at all.
        value_dtype: of all weights: "float16", also for None, or "float32".

    Raises:
        InputError: the source is not 2:4, is quantized, or does not fit float16; `out_dir` exists; or onnxscript is
            missing.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise InputError("the export for TensorRT needs onnxscript: pip install 'cast-serve[tensorrt]'")
    if value_dtype not in (None, *DTYPES):
        raise InputError(f"value dtype '{value_dtype}' cannot be exported for TensorRT: use {' or '.join(DTYPES)}")
    source = open_checkpoint(source_dir)
    if isinstance(source, PackedCheckpoint) and (source.quantization or source.embedding):
        raise InputError(
            f"{source.directory} is quantized, and TensorRT quantizes in its own way: export the model it was made from"
        )
    if isinstance(source, Checkpoint) and (violation := source.first_violation()) is not None:
        raise InputError(f"{violation}: TensorRT would run it dense")
    with new_directory(Path(out_dir), overwrite, source.directory, [PROVIDERS]) as building:
        model = dense_model(source, DTYPES[value_dtype or "float16"])
        if any(not tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise InputError(f"{source.directory} has weights beyond float16: export it with --value-dtype float32")
        model.set_attn_implementation("eager")  # others end in operators that TensorRT lacks
        _export(Logits(model), building / MODEL)
        copy_companions(source.directory, building)
        providers = {"TensorrtExecutionProvider": _options(context_length(source)), "CUDAExecutionProvider": {}}
        (building / PROVIDERS).write_text(json.dumps(providers, indent=1) + "\n")


def _export(module: Logits, path: Path) -> None:
    ids = torch.ones(2, 8, dtype=torch.long)  # sizes of one would be taken for constants
    sizes: dict[int, Any] = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    names = ["input_ids", "attention_mask"]
    with _quiet():
        program = torch.onnx.export(
            module,
            (ids, torch.ones_like(ids)),
            dynamo=True,
            dynamic_shapes=(sizes, sizes),
            input_names=names,
            output_names=["logits"],
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=True)


def _options(context: int) -> dict[str, str]:
    """Of the provider: 2:4 and 16 bits allowed, engines kept, and the sizes that one engine is built for."""

    def sizes(batch: int, sequence: int) -> str:
        return ",".join(f"{name}:{batch}x{sequence}" for name in ("input_ids", "attention_mask"))

    return {
        "trt_sparsity_enable": "1",
        "trt_fp16_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_profile_min_shapes": sizes(1, 1),
        "trt_profile_opt_shapes": sizes(1, min(512, context)),
        "trt_profile_max_shapes": sizes(8, min(4096, context)),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of operators of packages that are not installed, its optimizer of each rule it leaves out."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
