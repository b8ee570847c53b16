"""Every method from `train` to an exact 2:4 directory, and the options they share."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cast_train.adams import AdamS
from cast_train.config import CONFIGS, CastConfig, TrainConfig
from cast_train.health import read_metrics
from cast_train.methods import ONE_SHOT, trained_method
from cast_train.sparse_model import sparsify
from cast_train.trainer import parameter_groups
from conversion.errors import InputError
from tests.cast_train import tiny
from tests.cast_train.test_training import Setting, assert_exactly_2of4, cast, interrupt
from tests.cast_train.tiny import BUDGET
from tests.conversion.models import CONFIGS as MODELS
from tests.conversion.models import make_model

BASELINES = ["srste", "gmp", "ast"]


def config(method: str, **changes: object) -> TrainConfig:
    return CONFIGS[method](**{**BUDGET, **changes})


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """GPT-2 has dropout, so that a resumed run needs the random state, and transposed weights."""
    return Setting(tmp_path_factory.mktemp("methods"), "gpt2")


@pytest.mark.parametrize("method", BASELINES)
def test_baselines_end_exactly_2of4_resume_bit_identically_and_lose_nothing_at_the_cut(
    method: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = setting.train(method, config(method))
    out = setting.root / method
    assert_exactly_2of4(out)
    assert summary["after_cut"] == summary["before_cut"]
    assert summary["method"] == method
    metrics = read_metrics(out / "metrics.jsonl")
    assert metrics[-1]["ce"] < metrics[0]["ce"]
    assert ("pruned" in metrics[0]) == (method == "gmp")

    interrupt(setting, "stopped", config(method), 17, monkeypatch)  # after checkpoint 14, within GMP's fine-tuning
    setting.train("stopped", config(method), resume=True, overwrite=True)
    resumed = load_file(setting.root / "stopped" / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in load_file(out / "model.safetensors").items())
    shutil.rmtree(setting.root / "stopped")


def test_another_method_cannot_continue_a_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(setting, "other", config("srste"), 8, monkeypatch)
    with pytest.raises(InputError, match="method was srste, is gmp"):
        setting.train("other", config("gmp"), resume=True)


@pytest.mark.parametrize(
    "switch",
    [{"scaling_blocks": 0}, {"schedule": "constant"}, {"decay_norm": "l2"}, {"second_moment": "gradient"}],
    ids=lambda switch: next(iter(switch)),
)
def test_every_ablation_of_cast_trains_to_2of4(switch: dict[str, object], setting: Setting) -> None:
    name = f"cast-{next(iter(switch))}"
    summary = setting.train(name, tiny.config(steps=8, **switch), force=True)
    assert_exactly_2of4(setting.root / name)
    assert summary["config"].items() >= switch.items()
    assert ("budget" in summary) == ("decay_norm" not in switch)


def test_switches_reach_the_optimizer() -> None:
    settings = tiny.config(decay_norm="l2", second_moment="gradient", dense_lr=50.0)
    model = sparsify(make_model(MODELS["llama"], sparse=False), settings)
    optimizer = trained_method(settings).optimizer(parameter_groups(model, settings))
    assert isinstance(optimizer, AdamS)
    assert (optimizer.defaults["decay_norm"], optimizer.defaults["second_moment"]) == ("l2", "gradient")
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    layer = model.model.layers[0]
    dense = (layer.mlp.up_proj.scale, layer.input_layernorm.weight, model.model.embed_tokens.weight)
    assert {rates[id(p)] for p in dense} == {50 * settings.lr}
    assert rates[id(layer.mlp.up_proj.weight)] == settings.lr


def test_settings_of_another_method_and_impossible_ones_are_refused() -> None:
    with pytest.raises(InputError, match="gmp has no setting 'decay'"):
        config("gmp", decay=1.0)
    with pytest.raises(InputError, match="give a number"):
        tiny.config(decay="auto", decay_norm="l2")
    with pytest.raises(InputError, match="names no training method"):
        trained_method(TrainConfig())


def test_presets_give_every_method_the_same_budget() -> None:
    shared = {name: value for name, value in CastConfig.preset("quick") if name in TrainConfig.model_fields}
    for method in BASELINES:
        own = dict(CONFIGS[method].preset("quick"))
        different = {name for name, value in shared.items() if own[name] != value}
        assert different <= {"mask_interval", "temperature", "lr"}


@pytest.mark.parametrize("method", ["gmp", "magnitude"])
def test_command_line(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = Setting(tmp_path, "llama")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["train", str(llama.source), "--data", str(llama.text), "--out", str(tmp_path / "out")]
    arguments += ["--method", method, "--steps", "3", "--batch-tokens", "64", "--block-length", "16"]
    cast(monkeypatch, *arguments, "--warm-start", "none")
    assert_exactly_2of4(tmp_path / "out")


def test_help_is_readable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    cast(monkeypatch, "train", "--help")
    printed = capsys.readouterr().out
    for name in (*CONFIGS, *ONE_SHOT):
        assert name in printed
    assert all(len(line) <= 100 for line in printed.splitlines())
