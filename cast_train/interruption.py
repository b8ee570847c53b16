"""SIGTERM ends a training after the step it arrives in, with a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnSigterm(TrainerCallback):
    """Around `trainer.train()`: SIGTERM saves and stops it; to end the process at once there are SIGINT and SIGKILL.

    That is what comes first from `timeout`, a batch system's time limit, or a machine that is taken away. It comes more
    than once where these signal every process and torchrun hands it on. All processes stop after the same step,
    whichever got the signal; Trainer's own enable_jit_checkpoint does not see to that, and waits three seconds.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._before = signal.signal(signal.SIGTERM, self._ask)
        self._trainer.add_callback(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._trainer.remove_callback(self)
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        accelerator = self._trainer.accelerator
        if self._asked:
            accelerator.set_trigger()
        if accelerator.check_trigger() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
