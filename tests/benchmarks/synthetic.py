"""Made-up measurements whose statistics are known."""

from datetime import UTC, datetime

import numpy as np

from benchmarks.load.measurements import (
    BenchResult,
    Level,
    Machine,
    Memory,
    RequestSample,
    Role,
    Round,
    ServedModel,
    Settings,
)

CONCURRENCIES = [1, 4]
ROUNDS = 3
SPEEDUP = {1: 2.0, 4: 0.5}  # sparse wins alone and loses in company


def result() -> BenchResult:
    """Dense tokens take 10 ms; sparse ones 10 ms / SPEEDUP, give or take 1 % from round to round."""
    rounds = [_round(index, role) for index in range(ROUNDS) for role in ("dense", "sparse")]
    return BenchResult(
        date=datetime(2026, 1, 2, tzinfo=UTC),
        device="cpu",
        machine=Machine(cpu="Test CPU", cores=2, memory_bytes=8 << 30, system="Linux", versions={"python": "3.11"}),
        settings=Settings(concurrencies=CONCURRENCIES, output_tokens=11, rounds=ROUNDS),
        models={"dense": _model("dense"), "sparse": _model("sparse")},
        rounds=rounds,
    )


def _model(role: Role) -> ServedModel:
    size = 400_000_000 if role == "dense" else 250_000_000
    return ServedModel(
        directory=f"models/{role}",
        id=role,
        pattern="dense" if role == "dense" else "2:4",
        value_dtype="float32",
        sparse_layers=0 if role == "dense" else 210,
        weight_bytes=size,
        sparse_weight_bytes=0 if role == "dense" else 200_000_000,
        context_length=2048,
        kernel="avx512",
        disk_bytes=size,
        start_s=1.5,
    )


def _round(index: int, role: Role) -> Round:
    resident = 500_000_000 if role == "dense" else 300_000_000
    return Round(
        index=index,
        role=role,
        levels=[
            _level(c, 0.01 / (SPEEDUP[c] if role == "sparse" else 1.0) * (1 + 0.01 * index), resident)
            for c in CONCURRENCIES
        ],
        memory=Memory(
            resident=resident,
            peak_resident=600_000_000,
            unique=None,
            proportional=None,
            reported=None,
        ),
        server_cpu=1.9,
        idle_server_cpu=0.0,
        other_cpu=0.05,
    )


def _level(concurrency: int, token_s: float, resident: int) -> Level:
    starts = np.arange(4) * 11 * token_s
    return Level(
        concurrency=concurrency,
        resident=resident + 10_000_000 * concurrency,
        samples=[
            RequestSample(
                concurrency=concurrency,
                start_s=start,
                end_to_end_s=11 * token_s,
                ttft_s=token_s,
                gaps_s=[token_s] * 10,
                prompt_tokens=128,
                completion_tokens=11,
            )
            for start in starts.tolist()
        ],
    )
