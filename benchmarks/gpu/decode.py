"""`python -m benchmarks.gpu.decode`: tokens/s of a whole model on this GPU, dense and 2:4.

A decoding step of a Llama of random weights, its blocks compiled by torch, captured in a CUDA graph and replayed, as
serving engines do it. Embedding and lm_head are dense bfloat16 unless a form's name says more of lm_head.
"""

import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import LlamaConfig

from benchmarks.gpu.decoder import Decoder, MakeLinear
from benchmarks.shapes import SHAPES
from cast_serve.kernels.cuda.random_weights import QuantizedWeight, Weight
from cast_serve.kernels.cuda.timing import copy_bandwidth, seconds_per_call
from cast_serve.torch_model.gpu_linear import QUANTIZED, SPARSE
from cast_serve.torch_model.modules import PackedLinear, QuantizedLinear
from conversion.atomic import write_text
from conversion.quantization.formats import FP8, INT4, INT8, ValueFormat

DTYPE = torch.bfloat16
BATCHES = [1, 8, 32]


def dense(device: torch.device, N: int, K: int) -> nn.Module:
    return nn.Linear(K, N, bias=False, device=device, dtype=DTYPE)


class DenseFp8(nn.Module):
    """cuBLAS in 8-bit floats with scales of one; x is rounded in the call."""

    def __init__(self, device: torch.device, N: int, K: int) -> None:
        super().__init__()
        weight = torch.randn(N, K, device=device).to(torch.float8_e4m3fn)
        self.register_buffer("weight", weight.t())
        self.register_buffer("one", torch.ones((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch._scaled_mm(x.to(torch.float8_e4m3fn), self.weight, self.one, self.one, out_dtype=DTYPE)  # type: ignore[arg-type]
        return y


def sparse(device: torch.device, N: int, K: int) -> PackedLinear:
    linear = SPARSE[device.type](K, N, bias=False)
    random = Weight(N, K, DTYPE, device)
    linear.pack(random.values, random.bitmask)
    return linear


def quantized(device: torch.device, N: int, K: int, *, values: ValueFormat, group_size: int | None) -> PackedLinear:
    weight = QuantizedWeight(N, K, values, group_size, device)
    linear = QUANTIZED[device.type](K, N, bias=False)
    linear.pack(weight.stored, weight.bitmask, weight.scale / K, group_size, float_activations=True)
    return linear


def dense_int8(device: torch.device, N: int, K: int) -> PackedLinear:
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device)
    linear = QuantizedLinear(K, N, bias=False)
    linear.pack(codes, None, torch.full((N, 1), 1 / 127 / K, device=device), None, float_activations=True)
    return linear


MakeOnDevice = Callable[[torch.device, int, int], nn.Module]
sparse_int4 = partial(quantized, values=INT4, group_size=128)
FORMS: dict[str, tuple[MakeOnDevice, MakeOnDevice]] = {
    "dense bf16": (dense, dense),
    "dense fp8 (cuBLAS)": (DenseFp8, dense),
    "2:4 bf16": (sparse, dense),
    "2:4 fp8": (partial(quantized, values=FP8, group_size=None), dense),
    "2:4 int8": (partial(quantized, values=INT8, group_size=None), dense),
    "2:4 int4 g128": (sparse_int4, dense),
    "2:4 int4 g128, int8 lm_head": (sparse_int4, dense_int8),
}
"""The linears of the blocks, and lm_head; what is compared with first."""


def copies_of_one(make: MakeLinear) -> MakeLinear:
    """Makes one weight of each size; further ones are copies in memory of their own."""
    made: dict[tuple[int, int], nn.Module] = {}

    def linear(N: int, K: int) -> nn.Module:
        if (N, K) not in made:
            made[N, K] = make(N, K)
            return made[N, K]
        return copy.deepcopy(made[N, K])

    return linear


def weight_bytes(decoder: Decoder) -> int:
    """What a step reads: all weights but the embedding."""
    tensors = [*decoder.parameters(), *(b for name, b in decoder.named_buffers() if not name.endswith("cache"))]
    return sum(tensor.nbytes for tensor in tensors) - decoder.embedding.nbytes


def step_seconds(decoder: Decoder, batch: int, position: int) -> float:
    """Median seconds of the step after `position` tokens of each of `batch` sequences, in a CUDA graph."""
    decoder.set_batch(batch)
    ids = torch.zeros(batch, dtype=torch.long, device=decoder.embedding.device)
    if ids.device.type == "cuda":
        return seconds_per_call([lambda: decoder(ids, position)], repeats=30, budget=1.0)
    start = time.perf_counter()
    decoder(ids, position)
    return time.perf_counter() - start


def measure(name: str, shape: LlamaConfig, batches: list[int], context: int, device: torch.device) -> dict[str, Any]:
    """Step times of one form, by batch size."""
    linear, lm_head = FORMS[name]
    decoder = Decoder(
        shape, copies_of_one(partial(linear, device)), partial(lm_head, device), context + 1, device, DTYPE
    )
    # forms share their code: each is compiled from the start, for all batches, or fails
    torch.compiler.reset()
    for block in decoder.blocks:
        block.compile(dynamic=False, fullgraph=True, backend="inductor" if device.type == "cuda" else "eager")
    seconds = {batch: step_seconds(decoder, batch, context) for batch in batches}
    return {"weight_bytes": weight_bytes(decoder), "seconds": seconds}


def main(
    out: Annotated[Path | None, typer.Option("--json", help="Directory to write results to.")] = None,
    shape: Annotated[str, typer.Option(help=f"Of the model: {', '.join(SHAPES)}.")] = "8b",
    context: Annotated[int, typer.Option(help="Tokens before the step.", min=1)] = 512,
    form: Annotated[list[str] | None, typer.Option(help=f"May be repeated: {', '.join(FORMS)}.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal on the CPU.")] = False,
) -> None:
    """Measure decoding, form after form; a form that fails is named and the next one begun."""
    torch.manual_seed(0)
    device = torch.device("cpu" if tiny else "cuda")
    config = LlamaConfig(**SHAPES["tiny" if tiny else shape])
    on_cpu = [name for name in FORMS if "fp8" not in name]
    bandwidth = 0.0 if tiny else copy_bandwidth()
    found: dict[str, Any] = {}
    failed = False
    # what is not compiled is no comparison
    with torch.inference_mode(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for name in form or (on_cpu if tiny else list(FORMS)):
            try:
                found[name] = measure(name, config, BATCHES, 8 if tiny else context, device)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            except Exception as failure:  # a compiler has many; the other forms must still run
                found[name] = {"failure": f"{type(failure).__name__}: {failure}"[:2000]}
                failed = True
            print(summary(name, found, bandwidth), flush=True)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                record = {"shape": shape, "context": context, "copy_bandwidth": bandwidth, "forms": found}
                write_text(out / "decode.json", json.dumps(record, indent=1) + "\n")
    raise typer.Exit(1 if failed else 0)


def summary(name: str, found: dict[str, Any], bandwidth: float) -> str:
    """One line: milliseconds of a step and its speed over dense bfloat16, by batch size."""
    if "failure" in found[name]:
        return f"{name}: failed, {found[name]['failure']}"
    parts = []
    for batch, seconds in found[name]["seconds"].items():
        over = found.get("dense bf16", {}).get("seconds", {}).get(batch)
        ratio = f", x {over / seconds:.2f}" if over else ""
        share = f", {found[name]['weight_bytes'] / seconds / bandwidth:.0%} of copying" if bandwidth else ""
        parts.append(f"{batch} at once {seconds * 1e3:.2f} ms ({batch / seconds:.0f} tokens/s{ratio}{share})")
    return f"{name}, {found[name]['weight_bytes'] / 1e9:.2f} GB: {'; '.join(parts)}"


if __name__ == "__main__":
    typer.run(main)
