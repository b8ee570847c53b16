"""Run under torchrun: trains what the JSON of its first argument lists, one run after the other, in all processes.

A run with "stop_at" is given up at that step, as if it had been killed. After each finished one, `<out>.masks.pt` holds
the optimizer's masks of the final weights, gathered from all processes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from cast_train.config import CONFIGS
from cast_train.dtensor import whole
from cast_train.trainer import CastTrainer
from cast_train.training import train
from conversion.errors import InputError


class Stop(Exception):
    pass


def run(arguments: dict[str, Any]) -> None:
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # an earlier run's
    config = CONFIGS[arguments.pop("method")](**arguments.pop("config"))
    stop_at = arguments.pop("stop_at", None)
    out = Path(arguments["out"])
    training_step, finish = CastTrainer.training_step, CastTrainer.finish

    def stopping_step(self: CastTrainer, *args: Any) -> Any:
        if self.state.global_step == stop_at:
            raise Stop
        return training_step(self, *args)

    def finish_with_masks(self: CastTrainer) -> Any:
        optimizer: Any = self.optimizer
        optimizer = optimizer.optimizer
        optimizer.refresh_masks()
        masks = {
            name: whole(optimizer.state[p]["mask"])
            for name, p in self.student.named_parameters()
            if "mask" in optimizer.state[p]
        }
        if self.is_world_process_zero():
            torch.save(masks, out.with_name(out.name + ".masks.pt"))
        return finish(self)

    CastTrainer.training_step, CastTrainer.finish = stopping_step, finish_with_masks  # type: ignore[method-assign]
    try:
        train(**arguments, config=config, cache_dir=Path(arguments["source"]).parent / "cache")
    except Stop:
        print("stopped")
    except InputError as error:
        print(f"refused: {error}")
    finally:
        CastTrainer.training_step, CastTrainer.finish = training_step, finish  # type: ignore[method-assign]


if __name__ == "__main__":
    for listed in json.loads(sys.argv[1]):
        run(listed)
