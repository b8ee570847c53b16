"""`cast train` end to end on tiny models: exact 2:4 out, killed and resumed, refusals."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from cast_serve import cli
from cast_train import dataset, interruption, training
from cast_train.config import AstConfig, CastConfig, TrainConfig
from cast_train.dataset import TokenBlocks, load_tokens
from cast_train.evaluation.evaluate import evaluate
from cast_train.health import Health, read_metrics
from cast_train.run import Run
from cast_train.sparse_model import sparsify
from cast_train.trainer import CastTrainer, last_checkpoint, training_arguments
from cast_train.training import train
from conversion.errors import InputError, Interrupted
from conversion.families import family_of, in_scope
from tests.cast_train.tiny import BUDGET, FAMILIES, config, save_model, write_text
from tests.conversion.models import CONFIGS, make_model


class Setting:
    """A model, a text and a cache in a temporary directory."""

    def __init__(self, root: Path, family: str) -> None:
        self.root = root
        self.source = save_model(root / "dense", family)
        self.text = write_text(root / "text.txt")

    def train(self, out: str, settings: TrainConfig, **options: Any) -> dict[str, Any]:
        return train(self.source, [str(self.text)], self.root / out, settings, cache_dir=self.root / "cache", **options)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """GPT-2 has dropout, so that a resumed run needs the random state, and transposed weights."""
    return Setting(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture
def llama(tmp_path: Path) -> Setting:
    return Setting(tmp_path, "llama")


def assert_exactly_2of4(directory: Path) -> None:
    family = family_of(json.loads((directory / "config.json").read_text())["model_type"])
    pruned = 0
    for name, tensor in load_file(directory / "model.safetensors").items():
        assert tensor.dtype == torch.float32
        if in_scope(family, name, tensor.shape):
            rows = tensor.t() if family.transposed else tensor
            assert ((rows != 0).reshape(-1, 4).sum(1) <= 2).all(), name
            pruned += 1
    assert pruned > 0


def test_makes_a_plain_2of4_directory_and_says_what_happened(llama: Setting) -> None:
    (llama.source / "generation_config.json").write_text('{"temperature": 0.2, "do_sample": false}')  # kept as it is
    summary = llama.train("out", config(decay="auto", decay_ratio=300.0))
    out = llama.root / "out"
    assert_exactly_2of4(out)
    assert "scale" not in " ".join(load_file(out / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    assert (out / "generation_config.json").read_text() == (llama.source / "generation_config.json").read_text()
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()

    assert json.loads((out / "training.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["trained_tokens"] == 24 * 64
    assert summary["decay"] == pytest.approx(300 * summary["momentum"])
    assert summary["after_cut"]["ce"] == pytest.approx(summary["before_cut"]["ce"], abs=0.05)
    metrics = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 25))
    assert metrics[-1]["masked"] < 0.5 * metrics[0]["masked"]
    assert metrics[-1]["kept"] == pytest.approx(metrics[0]["kept"], rel=0.1)
    assert metrics[-1]["ce"] < metrics[0]["ce"]
    for line in metrics:
        assert line["loss"] == pytest.approx(line["kl"] / 3 + line["ce"] * 2 / 3, rel=1e-3)
        assert {"lr", "mask_flips", "tokens_per_s", "tokens"} <= line.keys()
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in llama.root.iterdir()) == ["cache", "dense", "out", "text.txt"]


def test_accumulated_micro_batches_are_one_batch(llama: Setting) -> None:
    whole = llama.train("whole", config(micro_batch_tokens=64, steps=5, save_steps=100))
    split = llama.train("split", config(micro_batch_tokens=16, steps=5, save_steps=100))
    assert split["after_cut"]["loss"] == pytest.approx(whole["after_cut"]["loss"], rel=1e-4)
    norms = [
        [line["grad_norm"] for line in read_metrics(llama.root / out / "metrics.jsonl")] for out in ("whole", "split")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)  # Adam's steps would hide a factor


def trainer_of(
    examples: list[dict[str, torch.Tensor]], directory: Path, family: str = "llama", **changes: Any
) -> CastTrainer:
    """For somebody's own loop over `examples`, with a teacher that is another model."""
    settings = config(warm_start="none", shrink=0.0, save_steps=100, **changes)
    student, teacher = (make_model(CONFIGS[family], sparse=sparse) for sparse in (False, True))
    args = training_arguments(settings, directory)
    return CastTrainer(sparsify(student, settings), settings, teacher, args=args, train_dataset=examples)


def test_tokens_with_a_label_count_alike_however_they_are_spread(tmp_path: Path) -> None:
    examples = []
    for row in range(8):
        ids = torch.randint(3, 97, (16,), generator=torch.Generator().manual_seed(row))
        labels = ids.clone()
        labels[: [0, 4, 14, 16, 1, 15, 3, 8][row]] = -100  # of the fourth none is left
        examples.append({"input_ids": ids, "labels": labels})
    found = []
    for micro_batch_tokens in (64, 32, 16):
        trainer = trainer_of(examples, tmp_path / "run", steps=2, micro_batch_tokens=micro_batch_tokens)
        trainer.train()
        found.append(
            [line[name] for line in trainer.state.log_history[:2] for name in ("loss", "ce", "kl", "grad_norm")]
        )
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_models_own_logits(family: str, tmp_path: Path) -> None:
    trainer = trainer_of([], tmp_path / "run", family)
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    assert trainer.teacher is not None
    with torch.no_grad():
        p, q = (model.eval()(ids).logits[:, :-1].log_softmax(-1) for model in (trainer.teacher, trainer.student))
        losses = trainer.distillation(trainer.student, {"input_ids": ids})
    ce = -q.gather(-1, ids[:, 1:, None]).mean()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert (losses.ce.item(), losses.kl.item()) == pytest.approx((ce.item(), kl.item()), rel=1e-4)


def test_padding_is_seen_by_neither_model(tmp_path: Path) -> None:
    trainer = trainer_of([], tmp_path / "run")
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    plain = trainer.distillation(trainer.model, {"input_ids": ids})
    pad = torch.full((2, 4), 1)
    padded = {
        "input_ids": torch.cat([pad, ids], dim=1),
        "attention_mask": torch.cat([pad * 0, torch.ones_like(ids)], dim=1),
        "position_ids": torch.cat([pad, torch.arange(12).expand(2, 12)], dim=1),
    }
    with pytest.raises(InputError, match="need labels, -100 where"):
        trainer.distillation(trainer.model, padded)
    labels = torch.cat([pad * 0 - 100, ids[:, :1] * 0 - 100, ids[:, 1:]], dim=1)
    losses = trainer.distillation(trainer.model, padded | {"labels": labels})
    assert (losses.ce.item(), losses.kl.item()) == pytest.approx((plain.ce.item(), plain.kl.item()), rel=1e-4)


def test_gradient_checkpointing_changes_no_weight(llama: Setting) -> None:
    llama.train("kept", config(steps=3, save_steps=100))
    llama.train("again", config(steps=3, save_steps=100, gradient_checkpointing=True))
    kept, again = (load_file(llama.root / out / "model.safetensors") for out in ("kept", "again"))
    for name, tensor in kept.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["llama", "opt"])  # OPT's blocks have dropout of their own
def test_gradient_checkpointing_keeps_less_also_while_the_momentum_is_measured(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(out: str, checkpointing: bool) -> tuple[int, int, float]:
        """Bytes that the forward passes keep before and in training, and the momentum."""
        sizes = {False: 0, True: 0}

        def counted(self: CastTrainer, *args: Any) -> Any:
            def keep(tensor: torch.Tensor) -> torch.Tensor:
                sizes[bool(self.state.max_steps)] += tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return distillation(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(CastTrainer, "distillation", counted)
            settings = config(steps=1, eta=0.0, shrink=0.0, gradient_checkpointing=checkpointing)
            momentum = setting.train(out, settings, force=True)["momentum"]
        return sizes[False], sizes[True], momentum

    setting, distillation = Setting(tmp_path, family), CastTrainer.distillation
    plain, saving = kept("plain", False), kept("saving", True)
    assert 0 < saving[0] < plain[0] / 2
    assert 0 < saving[1] < plain[1] / 2
    assert saving[2] == pytest.approx(plain[2], rel=1e-5)


@pytest.mark.parametrize("method", ["cast", "ast"])
def test_compiled_blocks_change_no_weight(llama: Setting, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's front ends; the code generator is tried in the next test, as it takes longer."""
    compiled, original = [], torch.compile

    def compile_quickly(function: Any) -> Any:
        compiled.append(function)
        return original(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    changes: dict[str, Any] = {"steps": 5, "mask_interval": 2}
    settings = config(**changes) if method == "cast" else AstConfig(**{**BUDGET, "decay": 1e-2, **changes})
    llama.train("plain", settings)
    assert not compiled
    llama.train("compiled", settings.model_copy(update={"compile": True}))
    assert len(compiled) == 2 * 2  # blocks of student and teacher
    plain, fused = (load_file(llama.root / out / "model.safetensors") for out in ("plain", "compiled"))
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"gradient_checkpointing": True}])
def test_compiled_losses_are_the_plain_ones(llama: Setting, changes: dict[str, Any]) -> None:
    llama.train("plain", config(**changes, steps=12))
    llama.train("compiled", config(**changes, steps=12, compile=True))
    plain, fused = (read_metrics(llama.root / out / "metrics.jsonl") for out in ("plain", "compiled"))
    tolerance = 2e-2 if changes.get("precision") == "bf16" else 1e-5
    for name in ("loss", "ce", "kl", "masked", "kept"):
        assert [line[name] for line in fused] == pytest.approx([line[name] for line in plain], rel=tolerance), name


def test_trains_in_bf16_without_a_teacher_and_with_frozen_embeddings(llama: Setting) -> None:
    before = load_file(llama.source / "model.safetensors")
    summary = llama.train("out", config(precision="bf16", eta=0.0, train_embeddings=False, steps=6))
    after = load_file(llama.root / "out" / "model.safetensors")
    assert_exactly_2of4(llama.root / "out")
    assert summary["after_cut"]["kl"] == 0
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_blocks_are_shortened_to_the_models_context(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "opt")  # 64 positions
    summary = setting.train("out", config(batch_tokens=192, block_length=96, steps=2, shrink=0.0))
    assert summary["config"]["block_length"] == 64
    assert summary["trained_tokens"] == 2 * 192


# Runs `train` with the arguments of its first argument, and is killed (SIGKILL) where the second one says.
KILLED_RUN = """
import json, os, pathlib, signal, sys
from cast_train.config import CastConfig
from cast_train.health import Health
from cast_train.trainer import CastTrainer
from cast_train.training import train

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

arguments, where, step = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if where == "step":
    log = Health.on_log
    Health.on_log = lambda self, args, state, *rest, **more: (
        kill() if state.global_step == step else log(self, args, state, *rest, **more)
    )
elif where == "checkpoint":  # the model and the optimizer are written, the rest is not
    save = CastTrainer._save_rng_state
    CastTrainer._save_rng_state = lambda self, out: kill() if self.state.global_step == step else save(self, out)
cache = pathlib.Path(arguments.pop("cache_dir"))
train(**{**arguments, "config": CastConfig(**arguments["config"])}, cache_dir=cache)
"""


def run_until_killed(setting: Setting, out: str, settings: CastConfig, where: str, step: int, resume: bool) -> None:
    arguments = {
        "source": str(setting.source),
        "data": [str(setting.text)],
        "out": str(setting.root / out),
        "config": settings.model_dump(),
        "resume": resume,
        "cache_dir": str(setting.root / "cache"),
    }
    process = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, json.dumps(arguments), where, str(step)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (setting.root / out).exists()


@pytest.fixture(scope="module")
def uninterrupted(gpt2: Setting) -> Iterator[Path]:
    gpt2.train("whole", config())
    return gpt2.root / "whole"


@pytest.mark.slow
def test_killed_twice_and_resumed_is_bit_identical(gpt2: Setting, uninterrupted: Path) -> None:
    run_until_killed(gpt2, "killed", config(), "step", 11, resume=False)
    run_until_killed(gpt2, "killed", config(), "checkpoint", 14, resume=True)
    assert (gpt2.root / "killed.run" / "checkpoint-14" / "model.safetensors").exists()
    gpt2.train("killed", config(log_steps=2, save_steps=3), resume=True)
    expected = load_file(uninterrupted / "model.safetensors")
    resumed = load_file(gpt2.root / "killed" / "model.safetensors")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert_exactly_2of4(uninterrupted)
    steps = [line["step"] for line in read_metrics(gpt2.root / "killed" / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert not (gpt2.root / "killed.run").exists()


def test_sigterm_stops_with_a_checkpoint_of_that_step(gpt2: Setting, uninterrupted: Path) -> None:
    def terminate(self: CastTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 9 and not sent:
            sent.append(signal.SIGTERM)  # in the first of the step's micro-batches, from the system and from torchrun
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, *args, **kwargs)

    sent: list[signal.Signals] = []
    training_step = CastTrainer.training_step
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CastTrainer, "training_step", terminate)
        with pytest.raises(Interrupted, match="stopped after step 10 of 24, as asked: go on with --resume"):
            gpt2.train("stopped", config())
    assert signal.getsignal(signal.SIGTERM) == handler
    assert last_checkpoint(gpt2.root / "stopped.run") == gpt2.root / "stopped.run" / "checkpoint-10"
    gpt2.train("stopped", config(), resume=True)
    expected = load_file(uninterrupted / "model.safetensors")
    resumed = load_file(gpt2.root / "stopped" / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_ctrl_c_stops_with_a_checkpoint_and_a_second_one_at_once(
    gpt2: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: CastTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            for second in times.pop(0) if times else ():
                monkeypatch.setattr(interruption, "monotonic", lambda second=second: second)
                signal.raise_signal(signal.SIGINT)
        return training_step(self, *args, **kwargs)

    times = [[100.0, 100.1]]
    training_step, handler = CastTrainer.training_step, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(CastTrainer, "training_step", interrupt)
    with pytest.raises(Interrupted, match="stopped after step 3 of 24"):
        gpt2.train("interrupted", config())
    assert last_checkpoint(gpt2.root / "interrupted.run") == gpt2.root / "interrupted.run" / "checkpoint-3"
    assert capsys.readouterr().err.count("stopping after this step") == 1
    times.append([100.0, 105.0])
    with pytest.raises(KeyboardInterrupt):
        gpt2.train("interrupted at once", config())
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_is_bit_identical(gpt2: Setting, uninterrupted: Path) -> None:
    """Moments drawn anew each time, from the first step to the saving of the result."""
    out = gpt2.root / "random"
    arguments = {"source": str(gpt2.source), "data": [str(gpt2.text)], "out": str(out), "resume": True}
    arguments |= {"config": config(save_steps=2).model_dump(), "cache_dir": str(gpt2.root / "cache")}
    kills, moments = 0, random.Random()
    while not out.exists():
        command = [sys.executable, "-c", KILLED_RUN, json.dumps(arguments), "never", "0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        logged = len(read_metrics(out.with_name("random.run") / "metrics.jsonl"))
        while kills < 3 and process.poll() is None:
            if len(read_metrics(out.with_name("random.run") / "metrics.jsonl")) > logged:
                time.sleep(moments.uniform(0, 0.4))
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        _, said = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
    assert kills > 0
    expected, resumed = (load_file(path / "model.safetensors") for path in (uninterrupted, out))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")]
    assert steps == list(range(1, 25))


class Stop(Exception):
    pass


def interrupt(setting: Setting, out: str, settings: CastConfig, at_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run in this process, as a crash would."""
    with monkeypatch.context() as patch:
        step = CastTrainer.training_step

        def training_step(self: CastTrainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == at_step:
                raise Stop
            return step(self, *args, **kwargs)

        patch.setattr(CastTrainer, "training_step", training_step)
        with pytest.raises(Stop):
            setting.train(out, settings)


def test_resuming_another_run_is_refused_and_every_difference_named(
    llama: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(llama, "out", config(), 8, monkeypatch)
    with pytest.raises(InputError, match="--resume"):
        llama.train("out", config())
    write_text(llama.text, seed=9)
    with pytest.raises(InputError) as refusal:
        llama.train("out", config(steps=30, decay=0.5, seed=4), resume=True)
    for difference in (
        "config.steps was 24, is 30",
        "config.decay was 0.01, is 0.5",
        "config.seed was 0, is 4",
        "data was ",
    ):
        assert difference in str(refusal.value)
    write_text(llama.text)
    save_model(llama.source, "qwen2")
    with pytest.raises(InputError, match="source was ") as refusal:
        llama.train("out", config(), resume=True)
    assert "config" not in str(refusal.value)
    save_model(llama.source, "llama")
    llama.train("out", config(), resume=True)
    assert_exactly_2of4(llama.root / "out")


def test_a_run_killed_before_its_first_checkpoint_begins_again(llama: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(llama, "out", config(decay="auto", decay_ratio=300.0), 3, monkeypatch)
    resumed = llama.train("out", config(decay="auto", decay_ratio=300.0), resume=True)
    whole = llama.train("whole", config(decay="auto", decay_ratio=300.0))
    assert resumed["after_cut"] == whole["after_cut"]


def test_checkpoints_of_no_known_run_are_not_continued(llama: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a run was killed in the middle of removing its directory, of which run.json was the first to go."""
    interrupt(llama, "out", config(), 8, monkeypatch)
    (llama.root / "out.run" / "run.json").unlink()
    other = llama.train("out", config(seed=4))
    assert other["after_cut"] == llama.train("new", config(seed=4))["after_cut"]


def test_a_run_is_gone_by_its_name_before_its_files_are(llama: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, **options: Any) -> None:
        if ".out.run." in str(path):
            raise Stop
        rmtree(path, **options)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(Stop):
            llama.train("out", config(steps=2, shrink=0.0))
    assert not (llama.root / "out.run").exists()
    assert_exactly_2of4(llama.root / "out")
    llama.train("out", config(steps=2, shrink=0.0), overwrite=True)


def test_metrics_that_another_machine_keeps_are_said(llama: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "read_metrics", lambda path: [])
    with pytest.raises(InputError, match="all machines of a run must see the same OUT"):
        llama.train("out", config(steps=2, shrink=0.0))


def test_a_hopeless_schedule_is_refused_before_anything_is_written(llama: Setting) -> None:
    with pytest.raises(InputError, match=r"use learning rate \S+ or \d+ steps"):
        llama.train("out", config(warm_start="none", lr=1e-5, steps=3))
    assert sorted(path.name for path in llama.root.iterdir()) == ["cache", "dense", "text.txt"]
    llama.train("out", config(warm_start="none", lr=1e-5, steps=3), force=True)
    assert_exactly_2of4(llama.root / "out")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    llama: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        distillation = CastTrainer.distillation

        def diverging(self: CastTrainer, *args: Any) -> Any:
            losses = distillation(self, *args)
            if self.state.global_step == 9:
                losses.loss.data.fill_(float("nan"))
            return losses

        patch.setattr(CastTrainer, "distillation", diverging)
        with pytest.raises(InputError, match="nan at step 9, on blocks 36 to 37 of the run"):
            llama.train("out", config())
    assert [path.name for path in (llama.root / "out.run").glob("checkpoint-*")] == ["checkpoint-7"]
    assert not (llama.root / "out").exists()
    llama.train("out", config(), resume=True)


def test_the_batch_named_is_that_of_the_text(llama: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third micro-batch of step 1, with a step's six blocks in three of two."""
    settings = config(batch_tokens=96, micro_batch_tokens=32, steps=3)
    seen: list[torch.Tensor] = []
    distillation = CastTrainer.distillation

    def recorded(self: CastTrainer, model: Any, inputs: Any) -> Any:
        losses = distillation(self, model, inputs)
        if self.state.max_steps:  # not before the training
            seen.append(inputs["input_ids"])
            if len(seen) == 6:
                losses.loss.data.fill_(float("inf"))
        return losses

    monkeypatch.setattr(CastTrainer, "distillation", recorded)
    with pytest.raises(InputError, match="inf at step 1, on blocks 10 to 11 of the run"):
        llama.train("out", settings)
    tokens = load_tokens([str(llama.text)], AutoTokenizer.from_pretrained(llama.source), llama.root / "cache")
    blocks = TokenBlocks(tokens, 16, 18, settings.seed)
    assert torch.equal(seen[-1], torch.stack([blocks[10]["input_ids"], blocks[11]["input_ids"]]))


def test_a_gradient_that_is_not_finite_reaches_no_weight(llama: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """At step 6 its update would be in the checkpoint of step 7, and every resumed run would fail again."""

    def broken(self: CastTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(self, *args, **kwargs)
        if self.state.global_step == 6:
            self.student.get_output_embeddings().weight.grad[0, 0] = float("nan")
        return loss

    training_step = CastTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(CastTrainer, "training_step", broken)
        with pytest.raises(InputError, match="the gradient became nan at step 6: lower the learning rate"):
            llama.train("out", config(save_steps=1))
    assert last_checkpoint(llama.root / "out.run") == llama.root / "out.run" / "checkpoint-6"
    weights = load_file(llama.root / "out.run" / "checkpoint-6" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_a_full_disk_keeps_the_checkpoint_before(llama: Setting, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Files that cannot grow stand for the disk: at 20 kB the weights do not fit, at 200 kB the optimizer's state."""
    save = CastTrainer._save_checkpoint
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self: CastTrainer, *args: Any) -> None:
        if self.state.global_step == 14:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(CastTrainer, "_save_checkpoint", full)
        with pytest.raises(InputError, match=r"step 14 could not be written \(.+\): make room .* --resume"):
            llama.train("out", config())
    assert [path.name for path in (llama.root / "out.run").glob("checkpoint-*")] == ["checkpoint-7"]
    llama.train("out", config(), resume=True)
    assert_exactly_2of4(llama.root / "out")


@pytest.mark.parametrize(
    ("owner", "function", "file"),
    [(Run, "begin", "run.json"), (Health, "on_train_begin", "metrics.jsonl"), (Health, "on_log", "metrics.jsonl")],
)
def test_a_disk_full_of_the_runs_own_files_is_said(
    llama: Setting, monkeypatch: pytest.MonkeyPatch, owner: type, function: str, file: str
) -> None:
    if function == "on_train_begin":  # writes the lines again that a resumed run keeps
        interrupt(llama, "out", config(), 8, monkeypatch)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = getattr(owner, function)

    def full(*args: Any, **options: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
        try:
            return original(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, full)
        with pytest.raises(InputError, match=rf"out.run/{file} could not be written \(.+\): make room on the disk"):
            llama.train("out", config(), resume=True)
    assert function != "begin" or not (llama.root / "out.run").exists()
    llama.train("out", config(), resume=True)


@pytest.mark.parametrize("name", ["tokens", "model"])
def test_a_disk_full_of_tokens_or_of_the_result_is_said(
    llama: Setting, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also then nothing half-written stays, and what is trained is not lost."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(original: Any) -> Any:
        def function(*args: Any, **options: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            try:
                original(*args, **options)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        return function

    with monkeypatch.context() as patch:
        if name == "tokens":
            patch.setattr(dataset, "_tokenize", limited(dataset._tokenize))
        else:
            patch.setattr(training, "save_model", limited(training.save_model))
        what = "cache/.*" if name == "tokens" else "out"
        with pytest.raises(InputError, match=rf"/{what} could not be written \(.+\): make room on the disk"):
            llama.train("out", config(save_steps=4, steps=8))
    left = {path.name for path in (*llama.root.iterdir(), *(llama.root / "cache").iterdir())}
    assert not any(entry.startswith(".") for entry in left)
    assert "out" not in left
    if name == "model":
        assert last_checkpoint(llama.root / "out.run") == llama.root / "out.run" / "checkpoint-8"
    llama.train("out", config(save_steps=4, steps=8), resume=True)
    assert_exactly_2of4(llama.root / "out")


def test_a_tokenizer_of_another_model_is_refused(llama: Setting) -> None:
    other = AutoTokenizer.from_pretrained(llama.source)
    other.add_tokens(["the"])
    other.save_pretrained(llama.source)
    llama.text.write_text("the " * 200)
    message = r"tokenizer of .*dense does not match its model: it makes token 97, and the model knows 97"
    with pytest.raises(InputError, match=message):
        llama.train("out", config())
    assert not (llama.root / "out.run").exists()
    with pytest.raises(InputError, match=message):
        evaluate([llama.source], llama.text, 16, 64)


def test_processes_that_cannot_share_a_step_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    with pytest.raises(InputError, match="4 blocks a step cannot be shared by 3 devices"):
        training_arguments(config(), tmp_path)


def test_of_several_gpus_without_torchrun_one_is_used(
    llama: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trainer alone would spread the model over all, with a batch as many times as large."""

    def with_gpus(*arguments: Any) -> TrainingArguments:
        args = training_arguments(*arguments)
        args._n_gpu = 4
        return args

    def recorded(self: CastTrainer, model: Any, inputs: Any) -> Any:
        seen.append(tuple(inputs["input_ids"].shape))
        return distillation(self, model, inputs)

    seen: list[tuple[int, ...]] = []
    distillation = CastTrainer.distillation
    monkeypatch.setattr(CastTrainer, "distillation", recorded)
    monkeypatch.setattr(training, "training_arguments", with_gpus)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    llama.train("out", config(steps=1), force=True)
    assert set(seen) == {(2, 16), (1, 16)}  # the latter in the report
    assert "training on one of 4 GPUs: start with torchrun --nproc-per-node 4" in capsys.readouterr().out


def test_refuses_an_existing_directory_unless_told_to_replace_it(llama: Setting) -> None:
    (llama.root / "out").mkdir()
    with pytest.raises(InputError, match="already exists"):
        llama.train("out", config())
    llama.train("out", config(steps=2, shrink=0.0), overwrite=True)
    assert_exactly_2of4(llama.root / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"schedule": "polynomial"}, "schedule"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"decay": -1.0}, "decay"),
        ({"decay": "automatic"}, "decay"),
        ({"decay": "nan"}, "decay"),
        ({"lr": float("inf")}, "lr"),
        ({"batch_tokens": 100, "block_length": 64}, "multiple"),
        ({"tokens": 1000, "steps": 3}, "not both"),
        ({"tokens": 10, "steps": None}, "less than one step"),
    ],
)
def test_refuses_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_presets_can_be_changed() -> None:
    quick = CastConfig.preset("quick", steps=5, lr=None)
    assert (quick.total_steps, quick.tokens) == (5, None)
    assert quick.lr == CastConfig.preset("quick").lr
    full = CastConfig.preset("full")
    assert (full.lr, full.decay, full.eta, full.total_steps * full.batch_tokens) == (2e-5, 4e-7, 1 / 3, 7500 * 2**20)


def cast(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cast", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    if end.value.code:
        raise RuntimeError(end.value.code)


def test_command_line(llama: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(llama.root / "cache"))
    out = llama.root / "out"
    arguments = ["train", str(llama.source), "--data", str(llama.text), "--out", str(out), "--preset", "quick"]
    arguments += ["--steps", "3", "--batch-tokens", "64", "--block-length", "16", "--warm-start", "magnitude"]
    cast(monkeypatch, *arguments, "--force", "--set", "micro_batch_tokens=32", "--set", "betas=[0.8,0.9]")
    summary = json.loads((out / "training.json").read_text())
    assert (summary["config"]["micro_batch_tokens"], summary["config"]["betas"]) == (32, [0.8, 0.9])
    printed = capsys.readouterr().out
    assert "decay can move a weight by" in printed
    assert "step 3/3" in printed
    assert "left" in printed
    assert "after" in printed
    assert_exactly_2of4(out)
    bad_sets = (["--set", "micro_batch_tokens"], ["--set", "micro_batch_token=32"], ["--set", "name=x"])
    for bad in (["--lr", "0"], ["--preset", "slow"], ["--decay", "much"], *bad_sets):
        with pytest.raises(RuntimeError, match="2"):
            cast(monkeypatch, *arguments, *bad)
        assert capsys.readouterr().err.startswith("error: ")


def test_one_shot_command_line(
    llama: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(llama.root / "cache"))
    out = llama.root / "out"
    arguments = ["train", str(llama.source), "--data", str(llama.text), "--out", str(out), "--method", "wanda"]
    cast(monkeypatch, *arguments)
    assert capsys.readouterr() == (f"saved {out}\n", "")  # no bars where there is no terminal
    assert_exactly_2of4(out)
    with pytest.raises(RuntimeError, match="2"):
        cast(monkeypatch, *arguments)
    assert "pass --overwrite" in capsys.readouterr().err
    cast(monkeypatch, *arguments, "--overwrite")
    with pytest.raises(RuntimeError, match="2"):
        cast(monkeypatch, *arguments[:4], "--out", str(llama.source), "--overwrite")
    assert "would replace its source" in capsys.readouterr().err
