"""Run stages in order, reusing those whose work is done."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.pipeline.fingerprint import fingerprint
from benchmarks.pipeline.stages import Stage
from conversion.atomic import write_text

RECORD = "stages.json"
CAST = (sys.executable, "-m", "cast_serve.cli")


class StageFailed(Exception):
    """A stage ended with a non-zero exit code; it has printed why."""

    def __init__(self, stage: Stage, code: int) -> None:
        super().__init__(stage.name)
        self.stage = stage
        self.code = code


def run_stages(stages: Sequence[Stage], out: Path, console: Console, program: Sequence[str] = CAST) -> list[Stage]:
    """Run each stage as `program` with its command, unless `out`/stages.json says that it is done already.

    Returns the stages that ran.

    A stage is done when its outputs exist and its command and inputs are those of the last success. Raises StageFailed
    at the first failure; what is finished then stays finished.
    """
    record = out / RECORD
    done: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    pending = find_pending(stages, done)
    clock = Clock(pending)
    for number, stage in enumerate(stages, start=1):
        title = f"[bold]\\[{number}/{len(stages)}] {stage.name}[/]"
        seen = fingerprint(stage)
        if stage not in pending:
            console.print(f"{title}: done before, reused")
            continue
        console.print(f"{title}: {clock.describe()}")
        console.print(f"$ cast {shlex.join(stage.command)}", style="dim", soft_wrap=True, highlight=False)
        if done.pop(stage.name, None):  # commands refuse to overwrite, but this is an earlier run's own work
            write_text(record, json.dumps(done, indent=1))
            _remove(stage.outputs)
        code = _run([*program, *stage.command])
        if code != 0:
            raise StageFailed(stage, code)
        clock.finished(stage)
        done[stage.name] = seen
        out.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(done, indent=1))
    return pending


def find_pending(stages: Sequence[Stage], done: Mapping[str, str]) -> list[Stage]:
    """The stages that are not done, and those that read what these will write."""
    pending: list[Stage] = []
    changing: set[Path] = set()
    for stage in stages:
        is_done = done.get(stage.name) == fingerprint(stage) and all(output.exists() for output in stage.outputs)
        if not is_done or changing.intersection(stage.inputs):
            pending.append(stage)
            changing.update(stage.outputs)
    return pending


class Clock:
    """Estimates the time left: what the stages take on the demo's machine, times how this one compares so far."""

    def __init__(self, pending: Sequence[Stage]) -> None:
        self._pending = list(pending)
        self._start = time.monotonic()
        self._expected = 0.0

    def finished(self, stage: Stage) -> None:
        self._pending.remove(stage)
        self._expected += stage.minutes or 0.0

    def describe(self) -> str:
        elapsed = (time.monotonic() - self._start) / 60
        so_far = f"{elapsed:.0f} min so far"
        minutes = [stage.minutes for stage in self._pending if stage.minutes is not None]
        if len(minutes) < len(self._pending):
            return so_far
        pace = elapsed / self._expected if self._expected else 1.0
        return f"{so_far}, about {pace * sum(minutes):.0f} min left"


def _run(command: Sequence[str]) -> int:
    process = subprocess.Popen(command, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    try:
        return process.wait()
    except BaseException:  # interrupted: the stage must not outlive the pipeline
        process.terminate()
        process.wait()
        raise


def _remove(outputs: Sequence[Path]) -> None:
    for output in outputs:
        if output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)
