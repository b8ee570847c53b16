"""SIGTERM or Ctrl-C ends a training after the step it arrives in, with a checkpoint."""

import signal
import sys
import threading
from time import monotonic
from types import FrameType
from typing import Any, Self

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_BOUNCE_S = 1.0  # in which a second Ctrl-C is the same one, handed on by torchrun


class StopWhenAsked(TrainerCallback):
    """Around `trainer.train()`: SIGTERM and Ctrl-C save and stop it; a second Ctrl-C ends the process at once.

    SIGTERM is what comes first from `timeout`, a batch system's time limit, or a machine that is taken away. It comes
    more than once where these signal every process and torchrun hands it on. All processes stop after the same step,
    whichever got the signal; Trainer's own enable_jit_checkpoint does not see to that, and waits three seconds.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._asked = False
        self._interrupted = float("-inf")
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        self._trainer.add_callback(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._trainer.remove_callback(self)
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now, before = monotonic(), self._interrupted
            self._interrupted = now
            if now - before > _BOUNCE_S and self._asked:
                raise KeyboardInterrupt
            if not self._asked and self._trainer.is_world_process_zero():
                print("stopping after this step, with a checkpoint (Ctrl-C again: at once)", file=sys.stderr)
        self._asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        accelerator = self._trainer.accelerator
        if self._asked:
            accelerator.set_trigger()
        if accelerator.check_trigger() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
