"""What a run says while it goes: one line per log on the console, one object per log in metrics.jsonl."""

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from conversion.atomic import room_for, write_text

_LOGGED = ("loss", "ce", "kl", "masked", "kept", "mask_flips", "pruned")


class Health(TrainerCallback):
    """Logs losses, mean |masked| (must fall), mean |kept| (must hold), mask flips (must fall), the part of
    groups that is pruned where a method prunes gradually, lr, speed, time left.

    Args:
        path: metrics.jsonl; lines of steps that a resumed run does again are dropped.
        batch_tokens: tokens per step.
        console: where lines go.
    """

    def __init__(self, path: Path, batch_tokens: int, console: Console) -> None:
        self._path = path
        self._batch_tokens = batch_tokens
        self._console = console

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = self._last_log = time.monotonic()
        self._first_step = self._last_step = state.global_step
        if state.is_world_process_zero:
            kept = [line for line in read_metrics(self._path) if line["step"] <= state.global_step]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            self._seconds_before = kept[-1]["seconds"] if kept else 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "ce" not in logs:
            return
        now = time.monotonic()
        elapsed = now - self._start
        left = elapsed / (state.global_step - self._first_step) * (state.max_steps - state.global_step)
        speed = (state.global_step - self._last_step) * self._batch_tokens / (now - self._last_log)
        self._last_log, self._last_step = now, state.global_step
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self._batch_tokens,
            **{name: logs[name] for name in _LOGGED if name in logs},
            "lr": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens_per_s": speed,
            "seconds": self._seconds_before + elapsed,
        }
        with room_for(self._path), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._console.print(
            f"step {state.global_step}/{state.max_steps}",
            f"loss {line['loss']:.3f}  CE {line['ce']:.3f}  KL {line['kl']:.3f}",
            f"masked {line['masked']:.2e}  kept {line['kept']:.2e}  flips {line['mask_flips']:.0f}"
            + (f"  pruned {line['pruned']:.0%}" if "pruned" in line else ""),
            f"lr {line['lr']:.1e}  {speed:.0f} tokens/s  {timedelta(seconds=round(left))} left",
            sep="  ",
        )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the logged lines, without a last one that was cut off in writing; none if there is no file."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
