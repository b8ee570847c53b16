"""The README's examples of AdamS run as they are printed there."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cast_train import nm_mask
from conversion.families import family_of, in_scope
from tests.cast_train.tiny import save_model, write_text

README = Path(__file__).parents[2] / "README.md"


def example(having: str) -> str:
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if having in code)
    return found


def test_in_a_loop_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(example("import AdamS, nm_mask"), names)
    before, after = (float(number) for number in re.findall(r"\d\.\d+", capsys.readouterr().out))
    assert before < 0.4  # of a variance of 0.5
    assert abs(after - before) < 1e-3
    for weight in names["sparse"]:  # type: ignore[attr-defined]
        assert ((weight != 0).view(-1, 4).sum(1) == 2).all()


def test_in_transformers_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(Path("my-model"))
    write_text(Path("train.txt"))
    exec(example("TrainerCallback"), {})
    masked = [float(number) for number in re.findall(r"'masked': ([\d.e-]+)", capsys.readouterr().out)]
    assert masked[-1] < masked[0] / 3
    weights = load_file("sparse-model/model.safetensors")
    dense = load_file("my-model/model.safetensors")
    assert weights.keys() == dense.keys()  # plain: nothing of weight scaling is left
    pruned = [name for name in weights if in_scope(family_of("llama"), name, weights[name].shape)]
    assert pruned
    for name in pruned:
        assert (((weights[name] != 0).view(-1, 4).sum(1)) <= 2).all(), name
        assert torch.equal(weights[name], weights[name] * nm_mask(weights[name]))
