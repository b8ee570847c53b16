"""`cast bench` as a user runs it, on tiny random models with the real servers."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.load.measurements import BenchResult
from conversion import save_packed
from tests.cast_serve.tiny_tokenizers import byte_level
from tests.conversion.models import CONFIGS, make_model

CAST = (sys.executable, "-m", "cast_serve.cli")
SHORT = ("--concurrency", "1,2", "--prompt-tokens", "8", "--output-tokens", "4", "--requests", "1", "--rounds", "1")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model, and a packed one of the same shape."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_level()
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = tokenizer.get_vocab_size()
    for name, sparse in (("dense", False), ("pruned", True)):
        make_model(config, sparse=sparse).save_pretrained(root / name)
        tokenizer.save(str(root / name / "tokenizer.json"))
    save_packed(root / "pruned", root / "packed")
    return root / "dense", root / "packed"


def bench(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    search_path = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "120"}
    return subprocess.run(
        [*CAST, "bench", *map(str, arguments)], cwd=cwd, env=search_path, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_bench_measures_two_models(directories: tuple[Path, Path], tmp_path: Path) -> None:
    dense, sparse = directories
    done = bench("--dense", dense, "--sparse", sparse, "--out", "out", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = BenchResult.model_validate_json((tmp_path / "out/bench.json").read_bytes())
    assert result.models["dense"].sparse_layers == 0
    assert result.models["sparse"].sparse_layers >= 2 * 4  # at least qkv, o, gate_up, down in each of two blocks
    assert result.models["sparse"].sparse_weight_bytes > 0
    for round_ in result.rounds:
        assert round_.memory.reported is not None
        assert round_.memory.reported == pytest.approx(round_.memory.resident, rel=0.2)
        for level in round_.levels:
            assert [sample.error for sample in level.samples] == [None] * 4
            assert all((s.prompt_tokens, s.completion_tokens, len(s.gaps_s)) == (8, 4, 3) for s in level.samples)
    assert "tokens/s, 2 at once" in done.stdout
    assert "report.html" in done.stdout
    assert "2:4 sparse against dense" in (tmp_path / "out/report.html").read_text()


def test_bench_refuses_a_dense_model_as_sparse(directories: tuple[Path, Path], tmp_path: Path) -> None:
    done = bench("--dense", directories[0], "--sparse", directories[0], *SHORT, cwd=tmp_path)
    assert done.returncode == 2
    assert "executes no 2:4 layer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bench/report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--dense", "nowhere", "--sparse", "nowhere"), "'nowhere' is no local directory and no model"),
        (
            ("--dense", ".", "--sparse", ".", "--concurrency", "1,x"),
            "--concurrency '1,x' is no list of positive numbers",
        ),
        (("--dense", ".", "--sparse", ".", "--training-curve", "none.png"), "none.png is no PNG file"),
    ],
)
def test_bad_input_gets_one_sentence(arguments: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    done = bench(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
