"""Every method from `train` to an exact 2:4 directory, and the options they share."""

from pathlib import Path

import pytest

from cast_train.config import CONFIGS, TrainConfig
from cast_train.health import read_metrics
from cast_train.training import train
from conversion.errors import InputError
from tests.cast_train.test_training import assert_exactly_2of4
from tests.cast_train.tiny import BUDGET, save_model, write_text

BASELINES = ["srste", "gmp", "ast"]


def config(method: str, **changes: object) -> TrainConfig:
    return CONFIGS[method](**{**BUDGET, **changes})


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    write_text(root / "text.txt")
    for family in ("llama", "gpt2"):
        save_model(root / family, family)
    return root


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", BASELINES)
def test_ends_exactly_2of4_and_the_cut_changes_nothing(method: str, family: str, texts: Path) -> None:
    out = texts / f"{family}-{method}"
    summary = train(texts / family, [str(texts / "text.txt")], out, config(method), cache_dir=texts / "cache")
    assert_exactly_2of4(out)
    assert summary["after_cut"] == summary["before_cut"]
    assert summary["method"] == method
    metrics = read_metrics(out / "metrics.jsonl")
    assert metrics[-1]["ce"] < metrics[0]["ce"]
    assert ("pruned" in metrics[0]) == (method == "gmp")


def test_a_setting_of_another_method_is_refused() -> None:
    with pytest.raises(InputError, match="gmp has no setting 'decay'"):
        config("gmp", decay=1.0)
