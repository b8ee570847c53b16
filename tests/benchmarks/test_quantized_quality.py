"""The comparison of quantized models, whole, on tiny ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quantized_quality
from cast_train.evaluation.perplexity import score_windows
from conversion.errors import InputError
from conversion.quantization.formats import INT4, INT8, Quantization
from tests.cast_train.tiny import save_model, tokenizer, write_text
from tests.conversion.models import CONFIGS, make_model


def test_the_table_the_json_and_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "dense")
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(tmp_path / "sparse")
    tokenizer().save_pretrained(tmp_path / "sparse")
    write_text(tmp_path / "text.txt")
    formats = [Quantization(INT8, None), Quantization(INT4, 32), Quantization(quantized_quality.INT3, 32)]
    monkeypatch.setattr(quantized_quality, "DENSE", formats)
    monkeypatch.setattr(quantized_quality, "SPARSE", formats[:2])
    text = tmp_path / "text.txt"

    def run() -> list[dict[str, Any]]:
        directories = {"work": tmp_path / "work", "out": tmp_path / "out", "name": "of-1.1b"}
        quantized_quality.main(tmp_path / "dense", tmp_path / "sparse", text, text, 512, 512, 64, **directories)
        (report,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*-of-1.1b.json"))
        assert report["versions"]["torch"]
        return report["results"]

    # Interrupted in its fourth measurement, it goes on there
    calls = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return score_windows(*arguments, **options)

    monkeypatch.setattr(quantized_quality, "score_windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "out").exists()
    results = run()
    assert calls == 4 + 1 + 6 + 1 + 4 - 3
    assert run() == results
    assert calls == 4 + 1 + 6 + 1 + 4 - 3
    assert len(results) == 1 + 6 + 1 + 4
    bits = {(r["model"], r["values"]): r["bits"] for r in results}
    # K is 32 in all linears but down_proj, where it is 56: two groups of 32
    scales = 32 * sum([32, 16, 16, 32, 56, 56, 2 * 32]) / sum([32 * 32, 16 * 32, 16 * 32, 32 * 32, 3 * 56 * 32])
    assert bits["dense", "float32"] == 32
    assert bits["2:4", "float32"] == 17
    assert bits["dense", "int4"] == pytest.approx(4 + scales)
    assert bits["2:4", "int4"] == pytest.approx(3 + scales)
    perplexity = {(r["model"], r["values"], r["rounding"]): r["perplexity"] for r in results}
    assert perplexity["2:4", "int8", "calibrated"] == pytest.approx(perplexity["2:4", "float32", "none"], rel=0.05)
    assert "- 2:4 int8:" in next((tmp_path / "out").glob("*.md")).read_text()
    assert next((tmp_path / "out").glob("*.png")).read_bytes().startswith(b"\x89PNG")


def test_a_dense_model_in_place_of_the_sparse_one_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "dense")
    with pytest.raises(InputError, match="is not 2:4: tensor"):
        quantized_quality.main(tmp_path / "dense", tmp_path / "dense", tmp_path / "t", tmp_path / "t")


def test_windows_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "dense")
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(tmp_path / "sparse")
    text = tmp_path / "text.txt"
    with pytest.raises(InputError, match="has a context of 64 tokens"):
        quantized_quality.main(tmp_path / "dense", tmp_path / "sparse", text, text, context=65)
