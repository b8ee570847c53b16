"""`python -m benchmarks.gpu.quality`: trained methods at a GPU's budget, over as many calls as it takes.

This is `benchmarks.quality table` with a GPU's settings. All that is done lies in --state. SIGTERM ends a call with a
checkpoint and status 143; the next call with the same arguments goes on there, and reuses what is finished.
"""

import json
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import quality
from cast_train.config import CONFIGS
from cast_train.devices import accelerator_key
from cast_train.health import read_metrics
from cast_train.plan import make_plan
from conversion.command import run

SETTINGS = (
    "batch_tokens=65536",
    "block_length=1024",
    "micro_batch_tokens=32768",
    "train_embeddings=true",
    "save_steps=300",
    "log_steps=20",
)
TOKENS = 100_000_000


def estimate(model: Path, tokens: list[int], methods: int, settings: list[str], mfu: float) -> str:
    """Say how long training will take, as far as that is known from the device's name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    start = f"{methods} trained methods x {sum(tokens):,} tokens"
    gpu = accelerator_key(name)
    if gpu is None:
        return f"{start}; the peak of '{name}' is not known, so neither is the time"
    changes, _ = quality.parse_settings(settings)
    config = CONFIGS["cast"].preset("quick", **changes, tokens=max(tokens))
    plan = make_plan(model, config, gpu=gpu, mfu=mfu)
    minutes = sum(tokens) / plan.tokens_per_s / 60
    return (
        f"{start} at {plan.flops_per_token / 1e9:.3g} GFLOP: {plan.tokens_per_s:,.0f} tokens/s if {mfu:.0%} of the "
        f"peak of {name} is reached, {minutes:.1f} minutes a method, {methods * minutes:.0f} in all, evaluation apart; "
        f"{plan.total_memory / 1e9:.0f} GB of memory"
    )


def unfinished(state: Path) -> dict[str, list[dict[str, float]]]:
    """The logged steps of runs that are under way, by the run's directory."""
    found = sorted(state.glob("*/model.run/metrics.jsonl"))
    return {path.parent.parent.name: read_metrics(path) for path in found}


def main(
    model: Annotated[Path, typer.Option(help="Dense model directory.")],
    heldout: quality.Heldout,
    state: Annotated[Path, typer.Option(help="Directory kept from one call to the next.")],
    out: Annotated[Path, typer.Option("--json", help="Directory to write the results to.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Training text; default: sampled from the model, see `cast train --data`.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Training tokens of each method: budgets, with commas.")] = str(TOKENS),
    methods: Annotated[str, typer.Option(help="In this order.")] = "dense,cast,ast,srste,gmp",
    set_: quality.Settings = [],  # noqa: B006
    eval_tokens: quality.EvalTokens = 50_176,
    mfu: Annotated[float, typer.Option(help="Part of the device's peak that the estimate assumes.")] = 0.2,
) -> None:
    """Train and evaluate, or go on with it."""
    settings = [*SETTINGS, *set_]
    trained = sum(name.strip() in CONFIGS for name in methods.split(","))
    print(estimate(model, quality.parse_budgets("--tokens", tokens), trained, settings, mfu), flush=True)
    os.environ["XDG_CACHE_HOME"] = str((state / "cache").resolve())  # tokens and sampled text
    work = state / "quality"
    out.mkdir(parents=True, exist_ok=True)
    try:
        quality.table(
            model,
            data or ["self"],
            heldout,
            tokens,
            methods,
            set_=settings,
            eval_tokens=eval_tokens,
            work=work,
            name="gpu-quality",
            out=out,
            keep_models=True,
        )
    finally:
        (out / "unfinished.json").write_text(json.dumps(unfinished(work), indent=1) + "\n")


if __name__ == "__main__":
    run(lambda: typer.run(main))
