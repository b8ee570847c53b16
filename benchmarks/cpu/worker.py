"""`python -m benchmarks.cpu.worker`: one candidate's turn. Reads a Job, prints a Turn, or the score of a text."""

import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.cpu.job import Job, Speed, Turn
from benchmarks.cpu.runner import Runner

WARM_UP_TOKENS = 4


def peak_memory() -> int:
    """Most bytes that this process has had resident, what it maps from files included.

    On Linux not by getrusage, which counts what the process was before it became this program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def load(job: Job) -> Runner:
    """Load the job's model for its highest concurrency."""
    sequences = max(job.concurrency)
    if job.runtime == "engine":
        from benchmarks.cpu.engine_runner import EngineRunner

        return EngineRunner(Path(job.model), job.threads, sequences)
    if job.runtime == "vllm":
        from benchmarks.cpu.vllm_runner import VllmRunner

        return VllmRunner(job)
    from benchmarks.cpu.llama_cpp_runner import LlamaCppRunner

    tokens = max(len(job.prompts[0]) + job.output_tokens, len(job.long_prompt) + 1)
    return LlamaCppRunner(Path(job.model), job.threads, sequences, tokens)


def generate(runner: Runner, prompts: list[list[int]], tokens: int, job: Job) -> Speed:
    """The median by time of as many generations as the job's `repeated_s` take, or of one."""
    runs = [runner.generate(prompts, tokens)]
    while sum(speed.seconds for speed in runs) < job.repeated_s:
        runs.append(runner.generate(prompts, tokens))
    return sorted(runs, key=lambda speed: speed.seconds)[len(runs) // 2]


def timed(job: Job) -> Turn:
    """Load, warm up, and time every concurrency and the long prompt."""
    start = time.perf_counter()
    runner = load(job)
    load_seconds = time.perf_counter() - start
    runner.generate([job.long_prompt], 1)
    runner.generate(job.prompts, WARM_UP_TOKENS)
    speeds = {users: generate(runner, job.prompts[:users], job.output_tokens, job) for users in job.concurrency}
    prefill = len(job.long_prompt) / generate(runner, [job.long_prompt], 1, job).seconds
    runner.close()
    return Turn(speeds, prefill, peak_memory(), load_seconds, runner.about, runner.weight_memory)


def score(job: Job) -> float:
    """Sum of the log-probabilities of each window's tokens but its first."""
    if job.runtime == "engine":
        from benchmarks.cpu import engine_runner

        return engine_runner.score(Path(job.model), job.threads, job.windows)
    from benchmarks.cpu.llama_cpp_runner import LlamaCppRunner

    runner = LlamaCppRunner(Path(job.model), job.threads, 1, len(job.windows[0]))
    total = runner.score(job.windows)
    runner.close()
    return total


def main() -> None:
    job = Job(**json.loads(sys.stdin.read()))
    print(json.dumps(score(job) if job.windows else asdict(timed(job))))


if __name__ == "__main__":
    main()
