"""Running candidates: each turn in a process of its own, one at a time, all candidates in every round."""

import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu.candidates import Candidate
from benchmarks.cpu.job import Job, Turn
from benchmarks.cpu.models import Sources, weight_bytes
from benchmarks.cpu.results import Measured
from benchmarks.load.machine import machine_cpu_s
from conversion.atomic import write_text
from conversion.errors import InputError

PERPLEXITIES = "perplexity.json"
REPEATED_S = 1.0
"""Of each timing in a turn: a small model generates in less, and what else the machine does would weigh too much."""
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """What every candidate is asked for; see Job. `python` runs the workers."""

    threads: int
    prompts: list[list[int]]
    long_prompt: list[int]
    output_tokens: int
    concurrency: list[int]
    python: str = sys.executable


def make(candidates: Sequence[Candidate], sources: Sources, say: Callable[[str], None]) -> None:
    """Make the files of each candidate that has none yet."""
    for i, candidate in enumerate(candidates):
        if not candidate.path(sources).exists():
            start = time.monotonic()
            say(f"making {candidate.name} ({i + 1} of {len(candidates)})")
            candidate.make(sources, candidate.path(sources))
            say(f"made {candidate.name} in {time.monotonic() - start:.0f} s")


def measure(
    candidates: Sequence[Candidate],
    sources: Sources,
    plan: Plan,
    rounds: int,
    perplexities: dict[str, float],
    advance: Advance,
) -> tuple[list[Measured], float]:
    """Time all candidates, round after round, each round starting with another one.

    Returns:
        The measurements, and the most cores that others kept busy during a turn.
    """
    found = {
        c.name: Measured(c.name, c.family, c.values, weight_bytes(c.path(sources)), perplexities.get(c.name))
        for c in candidates
    }
    others = 0.0
    for round_ in range(rounds):
        first = round_ * len(candidates) // rounds
        for candidate in [*candidates[first:], *candidates[:first]]:
            job = Job(
                candidate.runtime,
                str(candidate.path(sources).absolute()),
                plan.threads,
                plan.prompts,
                plan.long_prompt,
                plan.output_tokens,
                plan.concurrency,
                dtype=candidate.dtype,
                repeated_s=REPEATED_S,
            )
            clock, machine, own = time.perf_counter(), machine_cpu_s(), _own_cpu_s()
            found[candidate.name].turns.append(Turn.from_json(run(candidate, job, plan.python)))
            busy = machine_cpu_s() - machine - (_own_cpu_s() - own)
            others = max(others, busy / (time.perf_counter() - clock))
            advance(1)
    return list(found.values()), others


def score(
    candidates: Sequence[Candidate], sources: Sources, threads: int, windows: list[list[int]], advance: Advance
) -> dict[str, float]:
    """Perplexity of each candidate by name; known ones are taken from the work directory."""
    record = sources.work / PERPLEXITIES
    known: dict[str, float] = json.loads(record.read_text()) if record.exists() else {}
    text = hashlib.sha256(json.dumps(windows).encode()).hexdigest()[:16]
    tokens = sum(len(window) - 1 for window in windows)
    found = {}
    for candidate in candidates:
        key = f"{candidate.name} {text}"
        if key not in known:
            job = Job(candidate.runtime, str(candidate.path(sources).absolute()), threads, windows=windows)
            known[key] = math.exp(-float(run(candidate, job)) / tokens)
            write_text(record, json.dumps(known, indent=1) + "\n")
        found[candidate.name] = known[key]
        advance(1)
    return found


def run(candidate: Candidate, job: Job, python: str = sys.executable) -> str:
    """Do a job in a new process; InputError with the last it said if it fails."""
    command = [python, "-m", "benchmarks.cpu.worker"]
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
    done = subprocess.run(
        command, input=job.to_json(), capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, out of memory perhaps"]
        raise InputError(f"{candidate.name} ({job.model}) failed: {said[-1]}")
    return done.stdout


def _own_cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
