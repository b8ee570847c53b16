"""Kept warm starts: runs that start alike share one, others do not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cast_train import warm_start
from cast_train.training import train
from tests.cast_train.tiny import config, save_model, write_text


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 stores its linears transposed
def test_a_kept_start_is_taken_and_changes_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = save_model(tmp_path / "dense", family), write_text(tmp_path / "text.txt")
    pruned: list[str] = []
    prune = warm_start.prune
    monkeypatch.setattr(warm_start, "prune", lambda *a, **k: (pruned.append(a[1]), prune(*a, **k)))
    settings = config(warm_start="sparsegpt", calibration_tokens=256, steps=3, lr=1e-4)

    def weights(out: str, **changes: object) -> dict[str, torch.Tensor]:
        changed = type(settings)(**(settings.model_dump() | changes))
        kept = tmp_path / "starts"
        train(source, [str(text)], tmp_path / out, changed, cache_dir=tmp_path / "cache", kept_starts=kept, force=True)
        return load_file(tmp_path / out / "model.safetensors")

    first = weights("first")
    second = weights("second")
    assert pruned == ["sparsegpt"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    weights("another seed", seed=1)
    weights("another method", warm_start="wanda")
    assert pruned == ["sparsegpt", "sparsegpt", "wanda"]
    assert len(list((tmp_path / "starts").iterdir())) == 3
