"""Compare a sparse model with its dense one under the same load, round by round."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.load.machine import machine_cpu_s, this_machine, warn_if_busy
from benchmarks.load.measurements import (
    ROLES,
    BenchResult,
    Level,
    LoadPlan,
    RequestSample,
    Role,
    Round,
    ServedModel,
    Settings,
)
from benchmarks.load.prompts import random_prompts, text_prompts, vocab_size
from benchmarks.load.servers import Server
from conversion.errors import InputError


def measure(
    directories: dict[Role, Path],
    settings: Settings,
    out: Path,
    command: Callable[[Path, int], Sequence[str]],
    prompt_file: Path | None = None,
) -> BenchResult:
    """Serve both models, load one at a time, and return everything seen.

    `command` makes the argument list that serves a directory on a port; servers write their logs to `out`. The order
    alternates (dense, sparse, sparse, dense, ...), so that a slow drift of the machine falls on both alike. InputError
    if a server fails, the sparse one runs no sparse layer, or the requests do not fit the context.
    """
    requests = {concurrency: settings.requests_at(concurrency) for concurrency in settings.concurrencies}
    count = max(requests.values())
    if prompt_file is None:
        prompts = random_prompts(count, settings.prompt_tokens, min(map(vocab_size, directories.values())))
    else:
        prompts = text_prompts(prompt_file, count, settings.prompt_tokens, directories["dense"])
    console = Console()
    with ExitStack() as stack:
        servers: dict[Role, Server] = {}
        for role in ROLES:  # one after the other, so that neither slows the other's start
            console.print(f"starting the {role} server: {directories[role]}")
            servers[role] = stack.enter_context(Server(role, directories[role], out / f"{role}.log", command))
            servers[role].wait_ready()
        models = {role: servers[role].describe() for role in ROLES}
        _check_models(models, settings)
        warn_if_busy(console)
        result = BenchResult(
            date=datetime.now(UTC), device="cpu", machine=this_machine(), settings=settings, models=models, rounds=[]
        )
        with _progress(console) as progress:
            task = progress.add_task("load test", total=sum(requests.values()) * len(ROLES) * settings.rounds)
            for index in range(settings.rounds):
                for role in ROLES if index % 2 == 0 else reversed(ROLES):
                    progress.update(task, description=f"round {index + 1}, {role}")
                    plan = LoadPlan(
                        port=servers[role].port,
                        model=models[role].id,
                        prompts=prompts,
                        output_tokens=settings.output_tokens,
                        requests=requests,
                        warmup_users=max(settings.concurrencies) if index == 0 else 1,
                    )
                    round_ = _load_one(index, role, servers, plan, lambda: progress.advance(task))
                    result.rounds.append(round_)
                    progress.console.print(_round_line(round_), soft_wrap=True)
        return result


def _check_models(models: dict[Role, ServedModel], settings: Settings) -> None:
    sparse = models["sparse"]
    if sparse.pattern != "2:4" or sparse.sparse_layers == 0:
        raise InputError(
            f"the server of {sparse.directory} executes no 2:4 layer: give --sparse a directory that `cast convert` "
            "made from a 2:4 model"
        )
    context = min(model.context_length for model in models.values())
    if settings.prompt_tokens + settings.output_tokens > context:
        raise InputError(
            f"{settings.prompt_tokens} prompt tokens and {settings.output_tokens} output tokens exceed the context of "
            f"{context}: ask for fewer"
        )


def _load_one(index: int, role: Role, servers: dict[Role, Server], plan: LoadPlan, tick: Callable[[], None]) -> Round:
    idle = servers["sparse" if role == "dense" else "dense"]
    loaded = servers[role]
    clock, machine = time.perf_counter(), machine_cpu_s()
    loaded_cpu, idle_cpu = loaded.cpu_s(), idle.cpu_s()
    samples = []
    resident: Counter[int] = Counter()
    for sample in drive(plan):
        resident[sample.concurrency] = max(resident[sample.concurrency], loaded.resident())
        samples.append(sample)
        tick()
    loaded.check_alive()
    wall = time.perf_counter() - clock
    loaded_cores = (loaded.cpu_s() - loaded_cpu) / wall
    idle_cores = (idle.cpu_s() - idle_cpu) / wall
    others = (machine_cpu_s() - machine) / wall - loaded_cores - idle_cores
    levels = [
        Level(concurrency=c, samples=[s for s in samples if s.concurrency == c], resident=resident[c])
        for c in plan.requests
    ]
    for level in levels:
        if not level.succeeded:
            reason = level.samples[0].error if level.samples else "the load process reported none"
            raise InputError(
                f"every request to the {role} server at concurrency {level.concurrency} failed ({reason})"
                f"{loaded.log_tail()}"
            )
    return Round(
        index=index,
        role=role,
        levels=levels,
        memory=loaded.memory(),
        server_cpu=loaded_cores,
        idle_server_cpu=idle_cores,
        other_cpu=max(0.0, others),
    )


def drive(plan: LoadPlan) -> Iterator[RequestSample]:
    """Run the load process on `plan`, yielding its samples as requests finish, times counted from the first."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load.driver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as plan_input:
            plan_input.write(plan.model_dump_json())
        origin: float | None = None
        for line in process.stdout:
            sample = RequestSample.model_validate_json(line)
            origin = sample.start_s if origin is None else origin
            yield sample.model_copy(update={"start_s": sample.start_s - origin})
        if process.wait() != 0:
            raise RuntimeError(f"the load process ended with exit code {process.returncode}")
    finally:
        process.kill()
        process.wait()


def _round_line(round_: Round) -> str:
    speeds = ", ".join(f"{level.tokens_per_s:.1f} tokens/s at {level.concurrency}" for level in round_.levels)
    return f"round {round_.index + 1}, {round_.role}: {speeds}"


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    return Progress(*columns, console=console, speed_estimate_period=600)
