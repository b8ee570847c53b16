"""`python -m benchmarks.gpu.run_all`: the checks and measurements that need a GPU, what we most want to know first.

Each step is a command of its own with its own time limit; what one leaves undone does not harm the next. A call ends
within nine minutes: steps that no longer fit are named, and `--from` goes on with them. Nothing here needs a network;
models are random weights of a shape unless `--model` is given. `--tiny` tries everything in miniature, without a GPU.

The quality step takes more than one call. It is stopped with a checkpoint, and goes on in the next call with the same
--state. A machine without network gets its model as a GGUF file, in parts where one would be too large to bring:

    split -b 48M SmolLM2-135M-Instruct.Q4_1.gguf part-
    python -m benchmarks.registry from-gguf build/gpu/model part-*
    python -m benchmarks.gpu.run_all --model build/gpu/model --data text/ --heldout heldout.jsonl
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from conversion.atomic import write_text
from conversion.errors import Interrupted

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
TOTAL_S = 540.0
STATE = Path("build/gpu")
_WORTHWHILE_S = 10.0  # a step is not begun with less time than this
_NOT_INSTALLED = "is not installed"
_CUDA_PACKAGES = ("cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cusparselt-cu13", "nvidia-cublas")
_PACKAGES = ("torch", "transformers", "accelerate", "triton", "vllm", "numpy", "cast-serve", *_CUDA_PACKAGES)


@dataclass(frozen=True)
class Step:
    """A module of this project, run as `python -m module arguments --json DIRECTORY`.

    It fails by its exit status, and leaves its numbers as JSON files in the directory.

    Attributes:
        name: of the step.
        limit_s: seconds after which it is stopped.
        module: to run.
        arguments: its own ones.
        tiny: those in their place with --tiny.
        takes: which of `run_all`'s model, data, heldout and state it is given, if they are there.
        needs: those of them without which it is left out.
        package: without which it is left out.
        grace_s: seconds at the end of the limit in which it can write down where it was, after SIGTERM.
    """

    name: str
    limit_s: float
    module: str
    arguments: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    package: str = ""
    grace_s: float = 0.0


_BATCH = ("--batch-tokens", "65536", "--block-length", "2048", "--micro-batch-tokens")
_TINY_BATCH = ("--batch-tokens", "128", "--block-length", "32", "--micro-batch-tokens", "64", "--rounds", "1")
_TINY_QUALITY = (
    *("--tokens", "5120", "--methods", "dense,cast,ast", "--eval-tokens", "320", "--set", "batch_tokens=64"),
    *("--set", "block_length=16", "--set", "calibration_tokens=256", "--set", "lr=2e-3", "--set", "log_steps=1"),
)


def _kernels(part: str, limit_s: float) -> Step:
    """A process for each part: an error that a GPU does not recover from ends with it."""
    arguments = ("--part", part)
    return Step(f"kernels-{part}", limit_s, "benchmarks.gpu.kernels", arguments, tiny=("--tiny", *arguments))


STEPS = [
    _kernels("correctness", 150),
    _kernels("decode", 120),
    _kernels("graphs", 90),
    Step("decode", 300, "benchmarks.gpu.decode", tiny=("--tiny",)),
    _kernels("decode-quantized", 90),
    _kernels("prefill", 120),
    _kernels("prefill-quantized", 60),
    _kernels("hopper", 90),
    Step("training-correctness", 60, "benchmarks.gpu.training_correctness", tiny=("--device", "cpu")),
    Step(
        "training-speed-135m",
        180,
        "benchmarks.training",
        ("--shape", "135m", *_BATCH, "16384", "--compile"),
        tiny=_TINY_BATCH,
        takes=("model",),
    ),
    Step(
        "training-speed-1b",
        180,
        "benchmarks.training",
        ("--shape", "1b", *_BATCH, "8192", "--rounds", "2"),
        tiny=("--shape", "tiny", *_TINY_BATCH),
    ),
    Step("serving", 300, "benchmarks.gpu.serving", tiny=("--tiny",), package="vllm"),
    _kernels("tiles", 60),
    _kernels("cuts", 120),
    Step(
        "quality",
        TOTAL_S,
        "benchmarks.gpu.quality",
        tiny=_TINY_QUALITY,
        takes=("model", "data", "heldout", "state"),
        needs=("model", "heldout"),
        grace_s=45,
    ),
]
"""In order of what we most want to know; a new step is one more line."""


def run_step(
    step: Step, out: Path, limit_s: float, given: dict[str, list[str]], *, tiny: bool = False
) -> dict[str, Any]:
    """Run one step, its output into `out/<name>.log`; return its record.

    Args:
        step: what to run.
        out: directory of all steps' results.
        limit_s: seconds after which it is stopped.
        given: values of the options that steps can take.
        tiny: run it in miniature.
    """
    directory = out / step.name
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", step.module, *(step.tiny if tiny else step.arguments), "--json", str(directory)]
    for name in step.takes:
        for value in given.get(name, []):
            command += [f"--{name}", value]
    log = out / f"{step.name}.log"
    start = time.monotonic()
    with log.open("w") as file:
        # a session of its own, so that what it started ends with it
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "ok" if process.wait(limit_s - step.grace_s) == 0 else f"failed with {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s:.0f} s"
            if step.grace_s:
                process.terminate()
                status = "to be continued" if _ends(process, step.grace_s) == Interrupted.status else status
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "results": {path.name: _read(path) for path in sorted(directory.glob("*.json"))},
        "log_tail": log.read_text(errors="replace")[-2000:],
    }


def _read(path: Path) -> Any:
    """What a step has written; a text that is no JSON where it was killed while it did."""
    text = path.read_text(errors="replace")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _ends(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status, None if it takes longer."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def chosen(only: list[str], start: str | None) -> list[Step]:
    """Return the steps asked for; typer.BadParameter if one does not exist."""
    names = [step.name for step in STEPS]
    for name in (*only, *([start] if start else [])):
        if name not in names:
            raise typer.BadParameter(f"there is no step '{name}': {', '.join(names)}")
    steps = STEPS[names.index(start) :] if start else STEPS
    return [step for step in steps if not only or step.name in only]


def versions() -> dict[str, str]:
    installed = {str(found.metadata["Name"]).lower(): found.version for found in distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def device_record() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


def run_steps(
    steps: list[Step],
    out: Path,
    given: dict[str, list[str]],
    total_s: float,
    *,
    tiny: bool = False,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run steps until the time is over; return a record of each, also of those left out.

    Args:
        save: called with the records so far after each step.
    """
    end = time.monotonic() + total_s
    records: dict[str, Any] = {}
    for step in steps:
        left = end - time.monotonic()
        missing = [name for name in step.needs if not given.get(name)]
        if missing:
            records[step.name] = {"status": f"left out: give --{' and --'.join(missing)}"}
        elif step.package and find_spec(step.package) is None:
            records[step.name] = {"status": f"left out: {step.package} {_NOT_INSTALLED}"}
        elif left < _WORTHWHILE_S + step.grace_s:
            records[step.name] = {"status": "left out: no time left"}
        else:
            print(f"{step.name} (at most {min(step.limit_s, left):.0f} s)", flush=True)
            records[step.name] = run_step(step, out, min(step.limit_s, left), given, tiny=tiny)
        print(f"{step.name}: {records[step.name]['status']}", flush=True)
        save(records)
    return records


def main(
    only: Annotated[list[str] | None, typer.Option(help="Step to run; may be repeated.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="First step to run.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = RESULTS,
    model: Annotated[Path | None, typer.Option(help="Model directory, for the steps that can use one.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Training text, as for `cast train`; default: sampled from the model.")
    ] = None,
    heldout: Annotated[list[Path] | None, typer.Option(help="Text to score; may be repeated.")] = None,
    state: Annotated[Path, typer.Option(help="Directory kept from one call to the next.")] = STATE,
    total: Annotated[float, typer.Option(help="Seconds this call may take.")] = TOTAL_S,
    tiny: Annotated[bool, typer.Option("--tiny", help="All steps in miniature, on any device.")] = False,
) -> None:
    """Run the steps and write one dated JSON that names device and versions."""
    if not torch.cuda.is_available() and not tiny:
        print("error: this machine has no CUDA device: run it where there is one", file=sys.stderr)
        raise typer.Exit(2)
    now = datetime.now(UTC)
    directory = out / f"{now:%Y-%m-%d-%H%M%S}"
    steps = chosen(only or [], start)
    record = {"date": now.isoformat(timespec="seconds"), "device": device_record(), "versions": versions()}
    given = {
        "model": [] if model is None else [str(model)],
        "data": data or [],
        "heldout": [str(text) for text in heldout or []],
        "state": [str(state)],
    }
    path = out / f"{directory.name}.json"
    out.mkdir(parents=True, exist_ok=True)

    def save(records: dict[str, Any]) -> None:
        write_text(path, json.dumps({**record, "steps": records}, indent=1) + "\n")

    records = run_steps(steps, directory, given, total, tiny=tiny, save=save)
    print(f"wrote {path}")
    well = [step["status"] == "ok" or step["status"].endswith(_NOT_INSTALLED) for step in records.values()]
    raise typer.Exit(0 if all(well) else 1)


if __name__ == "__main__":
    typer.run(main)
