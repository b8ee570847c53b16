"""Making what the candidates run: ONNX directories and GGUF files, kept in a work directory for the next run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.random_models import save_model
from conversion.atomic import write_text
from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_model
from conversion.errors import InputError
from conversion.fingerprint import source_fingerprint
from conversion.onnx import GRAPH, export
from conversion.onnx.dense_nbits import DenseQuantization
from conversion.pack import save_packed
from conversion.quantization.formats import Quantization
from conversion.text import open_sources

_SOURCES = "sources.json"
_VERSION = 2
"""It goes up when other files are made of the same sources."""


@dataclass(frozen=True)
class Sources:
    """A model, dense and 2:4, and where what is made of it is kept.

    Attributes:
        dense: Hugging Face directory.
        sparse: its 2:4 version, dense-stored.
        calibration: text on which the linears of both are quantized for our kernels; none rounds to nearest.
        work: directory of made models.
    """

    dense: Path
    sparse: Path
    calibration: tuple[Path, ...]
    work: Path


Make = Callable[[Sources, Path], None]
"""Makes a candidate's model, which appears complete or not at all."""


def check_work(sources: Sources) -> None:
    """Claim the work directory for these sources; InputError if it holds models of others, or one is not 2:4."""
    if (violation := Checkpoint(sources.sparse).first_violation()) is not None:
        raise InputError(f"{sources.sparse} is not 2:4: {violation}")
    found = {
        "version": _VERSION,
        "dense": source_fingerprint(sources.dense),
        "sparse": source_fingerprint(sources.sparse),
        "calibration": [text.fingerprint() for path in sources.calibration for text in open_sources(str(path))],
        "graph": GRAPH,
    }
    sources.work.mkdir(parents=True, exist_ok=True)
    record = sources.work / _SOURCES
    if record.exists() and json.loads(record.read_text()) != found:
        raise InputError(
            f"{sources.work} holds models made from other sources, or by another release: name another --work, or "
            "delete it"
        )
    write_text(record, json.dumps(found, indent=1) + "\n")


def dense_float32(sources: Sources, out: Path) -> None:
    export(sources.dense, out)


def dense_stock(weights: Quantization, embedding: Quantization | None) -> Make:
    """As onnxruntime-genai's builder makes it: rounded to nearest."""
    quantization = DenseQuantization(weights, "MatMulNBits")
    return lambda sources, out: export(sources.dense, out, dense=quantization, embedding=embedding)


def dense_quantized(weights: Quantization, embedding: Quantization) -> Make:
    """Rounded as the 2:4 model is."""

    def make(sources: Sources, out: Path) -> None:
        quantization = DenseQuantization(weights, calibration=sources.calibration)
        export(sources.dense, out, dense=quantization, embedding=embedding)

    return make


def sparse_float32(sources: Sources, out: Path) -> None:
    export(sources.sparse, out, "float32")


def sparse_bfloat16(sources: Sources, out: Path) -> None:
    """Everything in bfloat16, embedding and lm_head too."""
    source = Checkpoint(sources.sparse)
    if source.dtype == torch.bfloat16:
        export(sources.sparse, out)
        return
    rounded = sources.work / "sparse-bfloat16"
    save_model(dense_model(source, torch.bfloat16), rounded)
    export(rounded, out)


def sparse_quantized(quantization: Quantization, embedding: Quantization) -> Make:
    def make(sources: Sources, out: Path) -> None:
        packed = sources.work / f"packed-{quantization.values.name}"
        if not packed.exists():
            save_packed(
                sources.sparse,
                packed,
                quantization=quantization,
                calibration=sources.calibration,
                show_progress=True,
            )
        export(packed, out, embedding=embedding)

    return make


def gguf(kind: str) -> Make:
    def make(sources: Sources, out: Path) -> None:
        from benchmarks.cpu.gguf_models import save_gguf

        save_gguf(sources.dense, out, kind)

    return make


def weight_bytes(model: Path) -> int:
    """Bytes on disk: a GGUF file's, an ONNX directory's graph and weights, a Hugging Face directory's shards."""
    files: Sequence[Path] = [model] if model.is_file() else [*model.glob("model.onnx*"), *model.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files)
