"""Where training starts: the dense weights, or one-shot pruned ones."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cast_train.config import TrainConfig
from cast_train.dataset import TokenCache
from cast_train.oneshot import prune
from cast_train.oneshot.calibration import calibration_samples
from cast_train.sparse_model import scope
from conversion.atomic import room_for


def warm_start(
    student: PreTrainedModel, config: TrainConfig, tokens: TokenCache, source: str, kept: Path | None = None
) -> None:
    """Prune the dense `student` in place as `config.warm_start` says.

    Args:
        student: float32 weights of the dense model.
        tokens: training text, from which calibration text is drawn.
        source: hash of the dense model.
        kept: directory of pruned weights; what an earlier start from the same things left there is taken.
    """
    if config.warm_start == "none":
        return
    path = None if kept is None else kept / f"{_identity(config, tokens, source)}.safetensors"
    weights = {name: module.weight for name, module in scope(student)}
    if path is not None and path.exists():
        with torch.no_grad():
            for name, weight in load_file(path).items():
                weights[name].copy_(weight)
        return
    calibration = calibration_samples(tokens, config) if config.warm_start != "magnitude" else None
    prune(student, config.warm_start, calibration, shrink=config.shrink)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(f".{os.getpid()}")
        try:
            with room_for(path):
                save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, building)
            building.replace(path)
        finally:
            building.unlink(missing_ok=True)


def _identity(config: TrainConfig, tokens: TokenCache, source: str) -> str:
    settings = ("warm_start", "shrink", "calibration_tokens", "block_length", "seed")
    parts = {"source": source, "data": tokens.fingerprint} | {name: getattr(config, name) for name in settings}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
