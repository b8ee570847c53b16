"""Two processes (gloo) train as one does, with DDP and with FSDP2; sharded runs go on under another number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cast_train.config import CONFIGS
from cast_train.health import read_metrics
from cast_train.training import train
from conversion.families import family_of, in_scope
from tests.cast_train import distributed_runs
from tests.cast_train.tiny import config, save_model, write_text

pytestmark = pytest.mark.slow

SETTINGS = config(log_steps=5).model_dump()
AST = {
    **{name: SETTINGS[name] for name in CONFIGS["ast"].model_fields if name in SETTINGS},
    "decay": 1e-2,
    "mask_interval": 4,
}


def launch(processes: int, *runs: dict[str, Any]) -> str:
    script = Path(distributed_runs.__file__)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    process = subprocess.run(
        [*torchrun, str(script), json.dumps(runs)],
        env=os.environ | {"PYTHONPATH": str(script.parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return process.stdout


class Trained:
    """Runs of two tiny models: in this process, in two processes with DDP and FSDP2, and stopped ones."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write_text(root / "text.txt")
        for family in ("llama", "gpt2"):
            path = save_model(root / family, family) / "config.json"
            # random numbers differ between one process and two
            dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if family == "gpt2" else {}
            path.write_text(json.dumps(json.loads(path.read_text()) | dropout))

    def run(self, family: str, out: str, method: str = "cast", **others: Any) -> dict[str, Any]:
        changes = {"fsdp": others.pop("fsdp")} if "fsdp" in others else {}
        return {
            "source": str(self.root / family),
            "data": [str(self.root / "text.txt")],
            "out": str(self.root / out),
            "method": method,
            "config": (SETTINGS if method == "cast" else AST) | changes,
            **others,
        }

    def train_here(self, family: str, out: str, method: str = "cast") -> None:
        run = self.run(family, out, method)
        settings = CONFIGS[run.pop("method")](**run.pop("config"))
        train(**run, config=settings, cache_dir=self.root / "cache")

    def weights(self, out: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / out / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("distributed")
    trained = Trained(root)
    trained.train_here("llama", "llama-alone")
    trained.train_here("gpt2", "gpt2-alone")
    trained.train_here("llama", "ast-alone", "ast")
    printed = launch(
        2,
        trained.run("llama", "llama-ddp"),
        trained.run("llama", "llama-fsdp", fsdp=True),
        trained.run("gpt2", "gpt2-fsdp", fsdp=True),
        trained.run("llama", "stopped", fsdp=True, stop_at=9),
        trained.run("llama", "copied-stopped", stop_at=9),
        trained.run("llama", "ast-stopped", "ast", fsdp=True, stop_at=9),
    )
    (root / "printed").write_text(printed)
    return trained


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if name.endswith("c_attn.bias"):  # attention does not depend on the keys' bias: its gradient is rounding error
            for weights in (one, other):
                weights[name].chunk(3)[1].zero_()
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("out", ["llama-ddp", "llama-fsdp", "gpt2-fsdp"])
def test_two_processes_train_as_one(trained: Trained, out: str) -> None:
    alone = f"{out.split('-')[0]}-alone"
    close(trained.weights(alone), trained.weights(out))
    for name in ("before_cut", "after_cut"):
        here, there = (json.loads((trained.root / run / "training.json").read_text())[name] for run in (alone, out))
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-5)
    here, there = (read_metrics(trained.root / run / "metrics.jsonl") for run in (alone, out))
    assert [line["step"] for line in there] == [1, 5, 10, 15, 20, 24]
    for name in ("ce", "masked", "kept", "mask_flips", "grad_norm"):
        assert [line[name] for line in there] == pytest.approx([line[name] for line in here], rel=1e-4)
    assert (trained.root / "printed").read_text().count(f"saved {trained.root / out}\n") == 1


@pytest.mark.parametrize("out", ["llama-ddp", "llama-fsdp", "gpt2-fsdp"])
def test_masks_of_the_saved_weights_are_the_optimizers(trained: Trained, out: str) -> None:
    family = family_of(out.split("-")[0])
    masks = torch.load(trained.root / f"{out}.masks.pt")
    weights = trained.weights(out)
    assert masks.keys() == {name for name, tensor in weights.items() if in_scope(family, name, tensor.shape)}
    for name, mask in masks.items():
        assert torch.equal(weights[name] != 0, mask), name
        rows = mask.t() if family.transposed else mask
        assert (rows.reshape(-1, 4).sum(1) == 2).all(), name


def test_runs_go_on_under_another_number_of_processes(trained: Trained) -> None:
    assert (trained.root / "stopped.run" / "checkpoint-7" / "optimizer_0" / ".metadata").is_file()
    printed = launch(
        1,
        trained.run("llama", "stopped", resume=True),
        trained.run("llama", "stopped", fsdp=True, resume=True),
        trained.run("llama", "copied-stopped", fsdp=True, resume=True),
        trained.run("llama", "copied-stopped", resume=True),
        trained.run("llama", "ast-stopped", "ast", fsdp=True, resume=True),
    )
    assert "written by a sharded run: continue it under torchrun with --fsdp" in printed
    assert "written by a run that was not sharded: continue it without --fsdp" in printed
    for out in ("stopped", "copied-stopped"):
        close(trained.weights("llama-alone"), trained.weights(out))
    close(trained.weights("ast-alone"), trained.weights("ast-stopped"))


def test_accelerate_launch_trains_as_one_process_does(trained: Trained) -> None:
    """As a user types it; also a setting's way from the command line through two processes."""
    settings = {**SETTINGS, "precision": "fp32", "decay": 1e-2, "warm_start": "magnitude", "shrink": 0.2}
    options = ("lr", "schedule", "batch_tokens", "block_length", "steps", "precision", "decay", "warm_start", "shrink")
    command = ["train", str(trained.root / "llama"), "--data", str(trained.root / "text.txt"), "--preset", "full"]
    command += [part for name in options for part in (f"--{name.replace('_', '-')}", str(settings[name]))]
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    accelerate += ["--main_process_port", "0"]  # any that is free
    process = subprocess.run(
        [*accelerate, "-m", "cast_serve.cli", *command, "--out", str(trained.root / "launched")],
        env=os.environ | {"XDG_CACHE_HOME": str(trained.root / "xdg")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    assert process.stdout.count(f"saved {trained.root / 'launched'}\n") == 1
    close(trained.weights("llama-alone"), trained.weights("launched"))
