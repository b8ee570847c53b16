"""The end-to-end comparison on tiny models; llama.cpp only where it is installed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.cpu import __main__ as cpu
from benchmarks.cpu import candidates, gguf_models, measure, report, worker
from benchmarks.cpu.job import Job, Speed, Turn
from benchmarks.cpu.models import Sources, check_work
from benchmarks.cpu.results import Measured, rates, rivals
from benchmarks.cpu.runner import log_likelihood
from benchmarks.report.statistics import Spread
from conversion.errors import InputError
from tests.cast_train.tiny import save_model, tokenizer, write_text
from tests.conversion.models import CONFIGS, make_model


def measured(name: str, family: str, values: str, perplexity: float, *speeds: float) -> Measured:
    """One request at once, a round for each of `speeds`."""
    turns = [Turn({1: Speed(10 / speed, 10, 5 / speed, 5)}, 100 * speed, 1000, 0.1, "test") for speed in speeds]
    return Measured(name, family, values, int(1e6), perplexity, turns)


FOUND = [
    measured("dense int8 A", "dense", "int8", 10, 10, 10, 10),
    measured("dense int8 B", "dense", "int8", 10.5, 20, 20, 10),
    measured("2:4 int8", "2:4", "int8", 12, 30, 10, 20),
    measured("llama.cpp Q8_0", "llama.cpp", "int8", 9, 5, 5, 5),
]


def test_ratios_are_of_rounds_against_the_fastest() -> None:
    by_name = rates([1])
    assert list(by_name) == ["1 at once", "prefill"]
    dense, llama = rivals(FOUND)
    assert dense.fastest(by_name["1 at once"]).name == "dense int8 B"
    assert dense.ratio(FOUND[2], by_name["1 at once"]) == Spread(1.5, 0.5, 2)
    assert llama.ratio(FOUND[2], by_name["1 at once"]) == Spread(4, 2, 6)


def test_the_report_says_where_sparse_loses(tmp_path: Path) -> None:
    slow = measured("2:4 fp32", "2:4", "fp32", 8, 4, 4, 4)
    mixed = measured("2:4 int4", "2:4", "int4", 8, 9, 9, 11)  # once faster than int8, which its median is not
    text = report.markdown([*FOUND, slow, mixed], [1], ["Title", "How."], "a.png")
    ours = "1.50 (0.50–2.00), 1.50 (0.50–2.00) | 4.00 (2.00–6.00), 4.00 (2.00–6.00)"
    assert f"| 2:4 int8 | {ours} |" in text
    assert "- 2:4 int8: perplexity is higher than of all others" in text
    assert "- 2:4 fp32: slower than dense int8 (1 at once 0.20 (0.20–0.40), prefill 0.20 (0.20–0.40)) and llama" in text
    assert "- 2:4 int4: nowhere here" in text
    report.plot(FOUND, [1], tmp_path / "a.png", "Title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_log_likelihood() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    targets = np.array([0, 6, 3, 3, 1])
    expected = torch.from_numpy(logits).double().log_softmax(1)[torch.arange(5), torch.from_numpy(targets)].sum()
    assert log_likelihood(logits, targets) == pytest.approx(expected.item(), rel=1e-12)


def test_without_llama_cpp_the_rest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_models, "installed", lambda: False)
    found, sentence = candidates.chosen([])
    assert found
    assert all(candidate.family != "llama.cpp" for candidate in found)
    assert "not installed" in sentence
    with pytest.raises(InputError, match="no candidate's name begins with 3:5"):
        candidates.chosen(["3:5"])


def test_short_generations_are_repeated_and_the_median_counts() -> None:
    seconds = iter([0.2, 0.9, 0.3, 0.4])

    class Fake:
        def generate(self, prompts: list[list[int]], tokens: int) -> Speed:
            return Speed(next(seconds), tokens, 0.1, tokens - 1)

    assert worker.generate(Fake(), [[1]], 4, Job("engine", "", 1, repeated_s=1.4)).seconds == 0.3  # type: ignore[arg-type]
    assert worker.generate(Fake(), [[1]], 4, Job("engine", "", 1)).seconds == 0.4  # type: ignore[arg-type]


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "REPEATED_S", 0.01)
    save_model(tmp_path / "dense")
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(tmp_path / "sparse")
    tokenizer().save_pretrained(tmp_path / "sparse")
    write_text(tmp_path / "text.txt")
    only = ["dense int8, ", "2:4 int8"] + (["llama.cpp Q8_0"] if gguf_models.installed() else [])

    def run() -> None:
        cpu.main(
            work=Path("work"),
            dense=tmp_path / "dense",
            sparse=tmp_path / "sparse",
            heldout=tmp_path / "text.txt",
            only=only,
            threads=1,
            rounds=1,
            concurrency=[1, 2],
            prompt_tokens=5,
            output_tokens=3,
            prefill_tokens=16,
            eval_tokens=192,
            context=48,
            out=tmp_path / "out",
        )

    run()
    [path] = (tmp_path / "out").glob("*.json")
    record = json.loads(path.read_text())
    assert [c["name"] for c in record["candidates"]][:2] == ["dense int8, int8 embedding", "2:4 int8, int8 embedding"]
    for candidate in record["candidates"]:
        [turn] = candidate["turns"]
        assert turn["speeds"]["2"]["tokens"] == 6
        assert turn["prefill_per_s"] > 0
        assert turn["peak_memory"] > candidate["weight_bytes"] > 0
        assert math.isfinite(candidate["perplexity"])
    if gguf_models.installed():
        dense, _, llama = record["candidates"]
        assert llama["perplexity"] == pytest.approx(dense["perplexity"], rel=0.1)
    write_text(tmp_path / "text.txt", seed=1)
    check_work(Sources(tmp_path / "dense", tmp_path / "sparse", (tmp_path / "text.txt",), tmp_path / "other"))
    write_text(tmp_path / "text.txt", seed=2)
    with pytest.raises(InputError, match="made from other sources"):
        check_work(Sources(tmp_path / "dense", tmp_path / "sparse", (tmp_path / "text.txt",), tmp_path / "other"))
    save_model(tmp_path / "dense")  # made anew: what was made of the old one must not pass for its
    with pytest.raises(InputError, match="made from other sources"):
        run()
