"""`python -m benchmarks.gpu.run_all`: the checks and measurements that need a GPU, what we most want to know first.

Each step is a command of its own with its own time limit; what one leaves undone does not harm the next. A call ends
within nine minutes: steps that no longer fit are named, and `--from` goes on with them. Nothing here needs a network;
models are random weights of a shape unless `--model` is given.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
TOTAL_S = 540.0
_WORTHWHILE_S = 10.0  # a step is not begun with less time than this
_PACKAGES = ("torch", "transformers", "accelerate", "triton", "vllm", "numpy", "cast-serve")


@dataclass(frozen=True)
class Step:
    """A module of this project, run as `python -m module arguments --json DIRECTORY`.

    It fails by its exit status, and leaves its numbers as JSON files in the directory. `model` marks a module that
    takes `--model DIRECTORY` in the place of a shape.
    """

    name: str
    limit_s: float
    module: str
    arguments: tuple[str, ...] = ()
    model: bool = False


_BATCH = ("--batch-tokens", "65536", "--block-length", "2048", "--micro-batch-tokens")

STEPS = [
    Step("training-correctness", 60, "benchmarks.gpu.training_correctness"),
    Step("training-speed-135m", 120, "benchmarks.training", ("--shape", "135m", *_BATCH, "16384"), model=True),
    Step("training-speed-1b", 180, "benchmarks.training", ("--shape", "1b", *_BATCH, "8192", "--rounds", "2")),
]
"""In order of what we most want to know; a new step is one more line."""


def run_step(step: Step, out: Path, limit_s: float, model: Path | None) -> dict[str, Any]:
    """Run one step, its output into `out/<name>.log`; return its record."""
    directory = out / step.name
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", step.module, *step.arguments, "--json", str(directory)]
    if step.model and model is not None:
        command += ["--model", str(model)]
    log = out / f"{step.name}.log"
    start = time.monotonic()
    with log.open("w") as file:
        # a session of its own, so that what it started ends with it
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "ok" if process.wait(limit_s) == 0 else f"failed with {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    results = {path.name: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "results": results,
        "log_tail": log.read_text(errors="replace")[-2000:],
    }


def chosen(only: list[str], start: str | None) -> list[Step]:
    """Return the steps asked for; typer.BadParameter if one does not exist."""
    names = [step.name for step in STEPS]
    for name in (*only, *([start] if start else [])):
        if name not in names:
            raise typer.BadParameter(f"there is no step '{name}': {', '.join(names)}")
    steps = STEPS[names.index(start) :] if start else STEPS
    return [step for step in steps if not only or step.name in only]


def versions() -> dict[str, str]:
    installed = {found.metadata["Name"].lower(): found.version for found in distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def device_record() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


def run_steps(steps: list[Step], out: Path, model: Path | None, total_s: float) -> dict[str, Any]:
    """Run steps until the time is over; return a record of each, also of those left out."""
    end = time.monotonic() + total_s
    records: dict[str, Any] = {}
    for step in steps:
        left = end - time.monotonic()
        if left < _WORTHWHILE_S:
            records[step.name] = {"status": "left out: no time left"}
        else:
            print(f"{step.name} (at most {min(step.limit_s, left):.0f} s)", flush=True)
            records[step.name] = run_step(step, out, min(step.limit_s, left), model)
        print(f"{step.name}: {records[step.name]['status']}", flush=True)
    return records


def main(
    only: Annotated[list[str] | None, typer.Option(help="Step to run; may be repeated.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="First step to run.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = RESULTS,
    model: Annotated[Path | None, typer.Option(help="Model directory, for the steps that can use one.")] = None,
    total: Annotated[float, typer.Option(help="Seconds this call may take.")] = TOTAL_S,
) -> None:
    """Run the steps and write one dated JSON that names device and versions."""
    if not torch.cuda.is_available():
        print("error: this machine has no CUDA device: run it where there is one", file=sys.stderr)
        raise typer.Exit(2)
    now = datetime.now(UTC)
    directory = out / f"{now:%Y-%m-%d-%H%M%S}"
    steps = chosen(only or [], start)
    record = {"date": now.isoformat(timespec="seconds"), "device": device_record(), "versions": versions()}
    records = run_steps(steps, directory, model, total)
    path = out / f"{directory.name}.json"
    path.write_text(json.dumps({**record, "steps": records}, indent=1) + "\n")
    print(f"wrote {path}")
    raise typer.Exit(0 if all(step["status"] == "ok" for step in records.values()) else 1)


if __name__ == "__main__":
    typer.run(main)
