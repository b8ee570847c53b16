"""`python -m benchmarks.training`: the speed of CAST with distillation beside plain distillation with AdamW.

Both train the same model in the same Trainer, on the same random tokens, in turns; the plain run has neither weight
scaling nor masks. With --compile CAST runs a third time, its blocks compiled. Reported are medians, where a step's time
goes, and the part of the device's peak that is used (MFU).
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Trainer

from benchmarks.load.machine import this_machine
from benchmarks.shapes import SHAPES
from benchmarks.timing import interleave
from cast_train.config import CastConfig
from cast_train.devices import peak_flops
from cast_train.distillation import distillation_loss
from cast_train.flops import token_flops
from cast_train.hidden_states import last_hidden_state
from cast_train.sparse_model import sparsify
from cast_train.trainer import CastTrainer, training_arguments
from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_model

RESULTS = Path(__file__).parent / "results"


class PlainTrainer(CastTrainer):
    """The same Trainer with the optimizer that Trainer itself would take: AdamW."""

    def create_optimizer(self, model: Any = None) -> Optimizer:
        optimizer: Optimizer = Trainer.create_optimizer(self, model)
        return optimizer


class Steps:
    """Optimizer steps of one trainer, one at a time, as Trainer's loop does them.

    Masks are not refreshed in them: `refresh` does that, so that each step costs the same whatever its number.
    """

    def __init__(self, trainer: CastTrainer, micro_batches: list[Tensor]) -> None:
        self.trainer = trainer
        self.micro_batches = [{"input_ids": ids.to(trainer.args.device)} for ids in micro_batches]
        trainer.current_gradient_accumulation_steps = len(micro_batches)
        self.optimizer: Any = trainer.create_optimizer()
        trainer.student.train()
        self._step(0)  # makes masks and moments
        for group in self.optimizer.param_groups:
            group["mask_interval"] = trainer.config.total_steps

    def step(self, number: int) -> None:
        self._step(number)
        synchronize(self.trainer.args.device)

    def _step(self, number: int) -> None:
        for inputs in self.micro_batches:
            self.trainer.training_step(self.trainer.student, inputs)
        self.trainer.accelerator.clip_grad_norm_(self.trainer.student.parameters(), self.trainer.config.max_grad_norm)
        self.optimizer.step()
        self.trainer.student.zero_grad()

    def refresh(self, number: int) -> None:
        self.optimizer.refresh_masks()
        synchronize(self.trainer.args.device)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def breakdown(steps: Steps, rounds: int) -> dict[str, float]:
    """Return the median seconds of a CAST step's parts; with a wait after each part, so their sum exceeds a step's."""
    trainer, device = steps.trainer, steps.trainer.args.device
    student, teacher, config = trainer.student, trainer.teacher, trainer.config
    taken: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        synchronize(device)
        taken.setdefault(name, []).append(time.perf_counter() - start)
        return result

    ids = steps.micro_batches[0]["input_ids"]
    head = student.get_output_embeddings().weight
    teacher_hidden = teacher_head = None
    for _ in range(rounds):
        with trainer.compute_loss_context_manager():
            output = timed(
                "student forward",
                lambda: student(input_ids=ids, output_hidden_states=True, logits_to_keep=1, use_cache=False),
            )
            if teacher is not None:
                with torch.no_grad():
                    teacher_hidden = timed("teacher", partial(last_hidden_state, teacher, ids))
                teacher_head = teacher.get_output_embeddings().weight
            loss = partial(distillation_loss, output.hidden_states[-1], head, ids, teacher_hidden, teacher_head)
            losses = timed("loss", partial(loss, eta=config.eta))
        timed("student backward", losses.loss.backward)
        timed("optimizer", steps.optimizer.step)
        student.zero_grad()
    parts = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return {name: s * (1 if name == "optimizer" else len(steps.micro_batches)) for name, s in parts.items()}


def measure(
    model: Callable[[], PreTrainedModel],
    config: CastConfig,
    rounds: int,
    after_round: Callable[[], object],
    *,
    compiled: bool = False,
) -> dict[str, Any]:
    """Time the runs in turns.

    Args:
        model: makes the dense model, float32.
        config: batch, block length and precision.
        rounds: turns of one timed step each.
        after_round: called after each, to show progress.
        compiled: also time CAST with compiled blocks, by the name "compiled".
    """
    with tempfile.TemporaryDirectory() as scratch:
        args = training_arguments(config, Path(scratch))
        dense = model()
        generator = torch.Generator().manual_seed(0)
        shape = (args.gradient_accumulation_steps, args.per_device_train_batch_size, config.block_length)
        tokens = torch.randint(dense.config.vocab_size, shape, generator=generator)
        teacher = dense if config.eta > 0 else None
        runs = {
            "cast": Steps(CastTrainer(sparsify(model(), config), config, teacher, args=args), list(tokens)),
            "plain": Steps(PlainTrainer(model(), config, teacher, args=args), list(tokens)),
        }
        if compiled:
            fused = config.model_copy(update={"compile": True})
            teacher = model() if config.eta > 0 else None  # its blocks are compiled too
            runs["compiled"] = Steps(CastTrainer(sparsify(model(), fused), fused, teacher, args=args), list(tokens))
        cast = runs["cast"]
        steps = interleave(
            {name: run.step for name, run in runs.items()}, rounds=rounds, calls=1, after_round=after_round
        )
        refresh = interleave({"refresh": cast.refresh}, rounds=2, calls=2)["refresh"]
        parts = breakdown(cast, -(-rounds // 2))
        seconds = {
            run: steps[run].median + (0.0 if run == "plain" else refresh.median / config.mask_interval) for run in runs
        }
        flops = token_flops(dense, config)
        device = args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_flops(name)
    speed = {run: tokens.numel() / s for run, s in seconds.items()}
    return {
        "device": name,
        "batch_tokens": tokens.numel(),
        "block_length": config.block_length,
        "micro_batches": len(tokens),
        "bf16": cast.trainer.bf16,
        "eta": config.eta,
        "gradient_checkpointing": config.gradient_checkpointing,
        "seconds_per_step": seconds,
        "tokens_per_s": speed,
        "ratio": speed["cast"] / speed["plain"],
        "compiled_ratio": speed["compiled"] / speed["cast"] if compiled else None,
        "flops_per_token": asdict(flops),
        "flops_per_s": {run: s * flops.total for run, s in speed.items()},
        "mfu": None if peak is None else {run: s * flops.total / peak for run, s in speed.items()},
        "breakdown_s": {**parts, f"mask refresh / {config.mask_interval}": refresh.median / config.mask_interval},
        "timings": {run: asdict(timing) for run, timing in {**steps, "refresh": refresh}.items()},
    }


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table("run", "s/step", "tokens/s", "GFLOP/s", "MFU", box=None)
    names = {"cast": "CAST", "plain": "distillation, AdamW", "compiled": "CAST, compiled"}
    for run in result["tokens_per_s"]:
        mfu = "peak unknown" if result["mfu"] is None else f"{result['mfu'][run]:.1%}"
        rate = result["flops_per_s"][run] / 1e9
        row = (f"{result['seconds_per_step'][run]:.4f}", f"{result['tokens_per_s'][run]:.0f}", f"{rate:.0f}", mfu)
        table.add_row(names[run], *row)
    console.print(table)
    console.print(f"CAST runs at {result['ratio']:.3f} of the plain speed")
    if result["compiled_ratio"] is not None:
        console.print(f"compiled, CAST runs at {result['compiled_ratio']:.3f} of its own speed")
    console.print("  ".join(f"{name} {s:.4f} s" for name, s in result["breakdown_s"].items()))


def main(
    model: Annotated[Path | None, typer.Option(help="Model directory; default: random weights of --shape.")] = None,
    shape: Annotated[str, typer.Option(help=f"Llama shape: {', '.join(SHAPES)}.")] = "135m",
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 512,
    micro_batch_tokens: Annotated[int, typer.Option(help="Most tokens run at once.")] = 4096,
    block_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    rounds: Annotated[int, typer.Option(help="Turns of one timed step for each run, after one not timed.")] = 3,
    eta: Annotated[float, typer.Option(help="Weight of the KL term; 0 has no teacher.")] = 1 / 3,
    train_embeddings: Annotated[bool, typer.Option(help="Train embeddings and lm_head.")] = True,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Time CAST with compiled blocks, too.")] = False,
    write: Annotated[Path | None, typer.Option("--json", help="Directory to write the result to.")] = None,
) -> None:
    """Measure training speed; `--json benchmarks/results` keeps the result."""
    console = Console()
    settings: dict[str, Any] = {
        "batch_tokens": batch_tokens,
        "block_length": block_length,
        "micro_batch_tokens": micro_batch_tokens,
        "steps": 100_000,
        "eta": eta,
        "train_embeddings": train_embeddings,
        "gradient_checkpointing": gradient_checkpointing,
    }
    config = CastConfig(**settings)

    def make() -> PreTrainedModel:
        if model is not None:
            return dense_model(Checkpoint(model), torch.float32)
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.float32)
        return made

    result = measure(make, config, rounds, lambda: console.print("round done"), compiled=compiled)
    print_result(result, console)
    if write is not None:
        machine = this_machine().model_dump()
        machine["versions"]["torch"] = torch.__version__
        now = datetime.now(UTC)
        record = {
            "date": now.isoformat(timespec="seconds"),
            "machine": machine,
            "threads": torch.get_num_threads(),
            "model": str(shape if model is None else model.name),
            **result,
        }
        write.mkdir(parents=True, exist_ok=True)
        path = write / f"training-{now:%Y-%m-%d-%H%M%S}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
