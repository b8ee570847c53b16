"""What is compared: one model in every form that a user of a CPU would think of."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.cpu import gguf_models, models
from benchmarks.cpu.job import Runtime
from benchmarks.cpu.models import Make, Sources
from conversion.errors import InputError
from conversion.quantization.formats import INT4, INT8, Quantization

Family = Literal["dense", "2:4", "llama.cpp"]


@dataclass(frozen=True)
class Candidate:
    """One form of the model.

    Attributes:
        name: as shown.
        family: which weights, and which program.
        values: number format of the linears: "fp32", "bf16", "int8" or "int4".
        make: makes its files.
        dtype: of activations and dense weights, for vLLM.
    """

    name: str
    family: Family
    values: str
    make: Make
    dtype: str = ""

    @property
    def runtime(self) -> Runtime:
        return "llama.cpp" if self.family == "llama.cpp" else "engine"

    def path(self, sources: Sources) -> Path:
        """Where its files are or will be."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return sources.work / f"{slug}.gguf" if self.family == "llama.cpp" else sources.work / slug


ROW_INT8 = Quantization(INT8, None)


def _stock(values: str, group: int, embedding: Quantization | None, name: str) -> Candidate:
    weights = Quantization(INT8 if values == "int8" else INT4, group)
    return Candidate(name, "dense", values, models.dense_stock(weights, embedding))


def _dense(weights: Quantization, embedding: Quantization, name: str) -> Candidate:
    return Candidate(name, "dense", weights.values.name, models.dense_quantized(weights, embedding))


def _sparse(weights: Quantization, embedding: Quantization, name: str) -> Candidate:
    return Candidate(name, "2:4", weights.values.name, models.sparse_quantized(weights, embedding))


# "ORT" is what onnxruntime-genai's builder makes: MatMulNBits, for lm_head too, and a float32 embedding. A quantized
# embedding, with lm_head, runs in our operators wherever it is named, so that what differs is the linears.
CANDIDATES = [
    Candidate("dense fp32", "dense", "fp32", models.dense_float32),
    _stock("int8", 32, None, "dense int8 g32 ORT"),
    _stock("int8", 128, ROW_INT8, "dense int8 g128 ORT, int8 embedding"),
    _dense(ROW_INT8, ROW_INT8, "dense int8, int8 embedding"),
    _stock("int4", 32, None, "dense int4 g32 ORT"),
    _stock("int4", 128, Quantization(INT4, 64), "dense int4 g128 ORT, int4 embedding"),
    _dense(Quantization(INT4, 32), ROW_INT8, "dense int4 g32, int8 embedding"),
    _dense(Quantization(INT4, 64), Quantization(INT4, 64), "dense int4 g64, int4 embedding"),
    Candidate("2:4 fp32", "2:4", "fp32", models.sparse_float32),
    Candidate("2:4 bf16", "2:4", "bf16", models.sparse_bfloat16),
    _sparse(ROW_INT8, ROW_INT8, "2:4 int8, int8 embedding"),
    _sparse(Quantization(INT4, 64), ROW_INT8, "2:4 int4 g64, int8 embedding"),
    _sparse(Quantization(INT4, 64), Quantization(INT4, 64), "2:4 int4 g64, int4 embedding"),
    Candidate("llama.cpp Q8_0", "llama.cpp", "int8", models.gguf("Q8_0")),
    Candidate("llama.cpp Q4_0", "llama.cpp", "int4", models.gguf("Q4_0")),
]


def chosen(only: list[str]) -> tuple[list[Candidate], str]:
    """The candidates whose names begin with one of `only`, all if it is empty, and a sentence on what is left out.

    Raises:
        InputError: there are none.
    """
    found = [c for c in CANDIDATES if not only or c.name.startswith(tuple(only))]
    sentence = ""
    if any(c.family == "llama.cpp" for c in found) and not gguf_models.installed():
        found = [c for c in found if c.family != "llama.cpp"]
        sentence = "llama.cpp is left out, it is not installed: pip install 'cast-serve[bench-cpu]'"
    if not found:
        raise InputError(f"no candidate's name begins with {' or '.join(only)}: see --list")
    return found, sentence
