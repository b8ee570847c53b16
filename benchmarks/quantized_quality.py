"""`python -m benchmarks.quantized_quality`: perplexity over bits per weight, 2:4 and dense, quantized alike.

Both models' linears are rounded by the same code, to nearest and on calibration text; embedding and lm_head stay as
they are. Bits count everything that is stored for a weight of these linears: value, bitmask, and float32 scales.
Dated markdown, JSON and a plot go to benchmarks/results. What is measured is kept in --work, so that a call that was
interrupted goes on.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.load.machine import this_machine
from cast_train.evaluation.evaluate import versions, window_length
from cast_train.evaluation.perplexity import score_windows
from cast_train.evaluation.windows import heldout_windows
from cast_train.run import source_hash
from conversion.atomic import write_text
from conversion.checkpoint import Checkpoint
from conversion.command import run
from conversion.dense_model import context_length, dense_model
from conversion.errors import InputError
from conversion.quantization.calibrated import calibration_sequences, scope_modules
from conversion.quantization.formats import FP8, INT4, INT8, Quantization, ValueFormat
from conversion.quantization.quantize import quantize_model
from conversion.text import read_documents

RESULTS = Path(__file__).parent / "results"

# No stored format: what a dense model must go down to for the bits of 2:4 with 4-bit values.
INT3 = ValueFormat("int3", 3, torch.int8, -4, 3, 64)

DENSE = [
    Quantization(INT8, None),
    Quantization(FP8, None),
    Quantization(INT4, 64),
    Quantization(INT4, 128),
    Quantization(INT3, 64),
    Quantization(INT3, 128),
]
SPARSE = [
    Quantization(INT8, None),
    Quantization(INT8, 64),
    Quantization(FP8, None),
    Quantization(INT4, 64),
    Quantization(INT4, 128),
]


@dataclass(frozen=True)
class Result:
    """One quantized model.

    Attributes:
        model: "dense" or "2:4".
        values: number format of the linears' weights.
        group_size: dense columns that share a scale; None is one scale a row, or no scales.
        rounding: "none", "nearest" or "calibrated".
        bits: stored per dense weight of the linears in scope.
        perplexity: on the held-out windows.
    """

    model: str
    values: str
    group_size: int | None
    rounding: str
    bits: float
    perplexity: float

    @property
    def name(self) -> str:
        group = "" if self.group_size is None else f" g{self.group_size}"
        return f"{self.model} {self.values}{group}"


def mean_bits(checkpoint: Checkpoint, quantization: Quantization | None, *, sparse: bool) -> float:
    """Bits per dense weight over the scope; unquantized values are as wide as the checkpoint stores them."""
    total = weights = 0.0
    for name in checkpoint.scope:
        rows, columns = checkpoint.linear_shape(name)
        if quantization is None:
            value, scale = 8.0 * checkpoint.shards.info(name).dtype.itemsize, 0.0
        else:
            value, scale = float(quantization.values.bits), 32 * quantization.groups(columns) / columns
        total += ((value / 2 + 1 if sparse else value) + scale) * rows * columns
        weights += rows * columns
    return total / weights


def results(
    checkpoint: Checkpoint, windows: Tensor, calibration: Tensor, work: Path, *, sparse: bool
) -> Iterator[Result]:
    """Score one model unquantized, then in every format with both roundings; each starts from the stored weights.

    What lies in `work` of an earlier call with the same model and texts is not measured again.
    """
    model_name = "2:4" if sparse else "dense"
    width = str(checkpoint.dtype).removeprefix("torch.")
    texts = [hashlib.sha256(tokens.numpy().tobytes()).hexdigest() for tokens in (windows, calibration)]
    shape = [windows.shape[1], calibration.shape[1]]
    identity = json.dumps([source_hash(checkpoint.directory), texts, shape, sparse])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    cells: list[tuple[Quantization | None, str]] = [(None, "none")]
    cells += itertools.product(SPARSE if sparse else DENSE, ("nearest", "calibrated"))
    for quantization, rounding in cells:
        values = width if quantization is None else quantization.values.name
        group_size = None if quantization is None else quantization.group_size
        path = work / digest / f"{values}-{group_size or 'row'}-{rounding}.json"
        if not path.exists():
            model = dense_model(checkpoint, torch.float32)
            if quantization is not None:
                linears = set(scope_modules(model, checkpoint).values())
                text = calibration if rounding == "calibrated" else None
                for _ in quantize_model(model, linears, quantization, text, sparse=sparse):
                    pass
            perplexity = score_windows(model, windows, description=f"{model_name} {values}").perplexity
            bits = mean_bits(checkpoint, quantization, sparse=sparse)
            path.parent.mkdir(parents=True, exist_ok=True)
            result = Result(model_name, values, group_size, rounding, bits, perplexity)
            write_text(path, json.dumps(asdict(result)) + "\n")
        yield Result(**json.loads(path.read_text()))


def markdown(found: list[Result]) -> str:
    """One line a format, by falling bits, and for each sparse one the dense one next to it in bits."""
    lines = ["| weights of the linears | bits/weight | perplexity, calibrated | to nearest |", "|---|---|---|---|"]
    by_name: dict[str, dict[str, Result]] = {}
    for result in found:
        by_name.setdefault(result.name, {})[result.rounding] = result
    for name, roundings in sorted(by_name.items(), key=lambda item: -next(iter(item[1].values())).bits):
        best = roundings.get("calibrated", roundings.get("none"))
        assert best is not None
        nearest = f"{roundings['nearest'].perplexity:.2f}" if "nearest" in roundings else ""
        lines.append(f"| {name} | {best.bits:.2f} | {best.perplexity:.2f} | {nearest} |")
    lines += ["", "At about equal bits (calibrated):", ""]
    dense = [result for result in found if result.model == "dense" and result.rounding == "calibrated"]
    for sparse in (result for result in found if result.model != "dense" and result.rounding == "calibrated"):
        beside = min(dense, key=lambda result: abs(result.bits - sparse.bits))
        lines.append(
            f"- {sparse.name}: {sparse.perplexity:.2f} in {sparse.bits:.2f} bits; "
            f"{beside.name}: {beside.perplexity:.2f} in {beside.bits:.2f} bits"
        )
    return "\n".join(lines) + "\n"


def plot(found: list[Result], path: Path) -> None:
    """Perplexity over bits per weight, calibrated formats; unquantized models as horizontal lines."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for model, color in (("dense", "tab:gray"), ("2:4", "tab:blue")):
        own = [result for result in found if result.model == model]
        points = sorted((r for r in own if r.rounding == "calibrated"), key=lambda r: r.bits)
        axis.plot([r.bits for r in points], [r.perplexity for r in points], "o", color=color, label=model)
        for result in points:
            label = result.name.removeprefix(f"{model} ").replace(FP8.name, "fp8")
            height = -10 if result.values == INT8.name else 4  # fp8 is just above
            axis.annotate(label, (result.bits, result.perplexity), (4, height), textcoords="offset points", fontsize=8)
        plain = next(result for result in own if result.rounding == "none")
        axis.axhline(plain.perplexity, color=color, linestyle=":", linewidth=1, label=f"{model} {plain.values}")
    axis.set_xlabel("bits per weight of the linears, bitmask and scales included")
    axis.set_ylabel("perplexity")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:.4g}")
    axis.yaxis.set_minor_formatter("{x:.4g}")
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main(
    dense: Annotated[Path, typer.Option(help="The dense model.")],
    sparse: Annotated[Path, typer.Option(help="Its 2:4 version, a plain Hugging Face directory.")],
    heldout: Annotated[Path, typer.Option(help="Held-out text.")],
    calibration: Annotated[Path, typer.Option(help="Text to calibrate on, other than the held-out one.")],
    tokens: Annotated[int, typer.Option(help="Most held-out tokens to score.")] = 50_176,
    calibration_tokens: Annotated[int, typer.Option(help="Most tokens to calibrate on.")] = 32_768,
    context: Annotated[int | None, typer.Option(help="Tokens per window, as for `cast eval`.")] = None,
    work: Annotated[Path, typer.Option(help="Directory of what is measured, to go on with.")] = Path("quantized"),
    name: Annotated[str, typer.Option(help="What results are called, after the date.")] = "quantized",
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = RESULTS,
) -> None:
    """Compare 2:4 and dense quantized models at equal bits.

    Example: python -m benchmarks.quantized_quality --dense SmolLM2-135M-Instruct --sparse work/cast
    --heldout heldout.jsonl --calibration train.jsonl
    """
    checkpoints = [Checkpoint(dense), Checkpoint(sparse)]
    if (violation := checkpoints[1].first_violation()) is not None:
        raise InputError(f"{sparse} is not 2:4: {violation}")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    context = window_length([dense, sparse], context)
    windows = heldout_windows(list(read_documents([heldout])), tokenizer, context, tokens)
    length = min(512, context_length(checkpoints[0]))
    sequences = calibration_sequences([calibration], tokenizer, length, calibration_tokens)
    found: list[Result] = []
    for checkpoint, is_sparse in zip(checkpoints, (False, True), strict=True):
        for result in results(checkpoint, windows, sequences, work, sparse=is_sparse):
            found.append(result)
            Console().print(f"{result.name}, {result.rounding}: {result.perplexity:.3f} in {result.bits:.2f} bits")
    report = {
        "date": date.today().isoformat(),
        "machine": this_machine().model_dump(),
        "versions": versions(),
        "dense": str(dense),
        "sparse": str(sparse),
        "heldout": {"data": str(heldout), "tokens": windows.numel(), "context": context},
        "calibration": {"data": str(calibration), "tokens": sequences.numel()},
        "results": [asdict(result) for result in found],
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = {ending: out / f"{report['date']}-{name}.{ending}" for ending in ("json", "md", "png")}
    write_text(paths["json"], json.dumps(report, indent=1) + "\n")
    write_text(paths["md"], markdown(found))
    plot(found, paths["png"])
    Console().print(markdown(found))
    Console().print(f"written: {paths['md']}, .json, .png", soft_wrap=True)


if __name__ == "__main__":
    run(lambda: typer.run(main))
