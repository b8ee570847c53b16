"""Where a decoding step's time goes, on tiny models."""

import json
from pathlib import Path

import pytest

from benchmarks.cpu import step_profile
from benchmarks.cpu.candidates import chosen
from benchmarks.cpu.models import Sources, dense_float32
from benchmarks.cpu.step_times import PARTS, StepTimes, read_weights
from conversion.errors import InputError
from tests.cast_train.tiny import tokenizer
from tests.conversion.models import CONFIGS, make_model


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported int8 models, dense and 2:4."""
    directory = tmp_path_factory.mktemp("step")
    for name in ("dense", "sparse"):
        make_model(CONFIGS["llama"], sparse=name == "sparse").save_pretrained(directory / name)
        tokenizer().save_pretrained(directory / name)
    sources = Sources(directory / "dense", directory / "sparse", (), directory)
    for candidate in chosen([step_profile.DENSE, step_profile.SPARSE])[0]:
        candidate.make(sources, candidate.path(sources))
    dense_float32(sources, directory / "float")
    return directory


def test_the_whole_command(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_profile.main(work, "Tiny-1.5", 1, rounds=1, batch=[1, 3], context=40, steps=3, out=tmp_path)
    (written,) = tmp_path.glob("cpu-step-tiny-1.5-after-40-*.json")
    record = json.loads(written.read_text())
    for of in record["seconds"].values():
        for size in ("1", "3"):
            assert set(of[size]["measured"]) == set(PARTS)
            assert all(seconds > 0 for seconds in of[size]["measured"].values())
            assert set(of[size]["memory"]) == set(of[size]["arithmetic"]) == {"layers", "lm_head"}
    text = capsys.readouterr().out
    assert text.count("| layers |") == 2
    assert "| 3 at once, ms |" in text


def test_weights_are_those_of_the_model(work: Path) -> None:
    candidates, _ = chosen([step_profile.DENSE, step_profile.SPARSE])
    dense, sparse = (candidate.path(Sources(work, work, (), work)) for candidate in candidates)
    shapes = [[(w.part, w.rows, w.columns, w.bits) for w in read_weights(path)] for path in (dense, sparse)]
    assert shapes[0] == shapes[1]
    config = CONFIGS["llama"]
    assert shapes[0][-1] == ("lm_head", config.vocab_size, config.hidden_size, 8)
    assert [w.sparse for w in read_weights(sparse)] == [True] * (len(shapes[1]) - 1) + [False]
    stored = [sum(w.stored_bytes for w in read_weights(path) if w.part == "layers") for path in (dense, sparse)]
    assert stored[1] < 0.8 * stored[0]


def test_other_models_are_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no product of int8 or int4 weights"):
        read_weights(work / "float")
    with pytest.raises(InputError, match=r"does not exist: run 'python -m benchmarks\.cpu"):
        step_profile.main(tmp_path, "none")


def test_bounds_are_the_slower_of_memory_and_arithmetic() -> None:
    others = {"lm_head": 1e-3, "attention": 1e-3, "rest": 1e-4}
    dense = StepTimes({"layers": 4e-3} | others, {"layers": 3e-3, "lm_head": 5e-4}, {"layers": 1e-3, "lm_head": 8e-4})
    memory, arithmetic = {"layers": 1.5e-3, "lm_head": 5e-4}, {"layers": 1.8e-3, "lm_head": 8e-4}
    sparse = StepTimes({"layers": 2e-3} | others, memory, arithmetic)
    text = step_profile.table(8, dense, sparse)
    assert "| layers | 4.00 | 3.00 / 1.00 | 2.00 | 1.50 / 1.80 | 2.00 |" in text
    assert "| a step | 6.10 |  | 4.10 |  | 1.49 |" in text
    assert "| the bound of its weights | 3.80 |  | 2.60 |  | 1.46 |" in text
    assert step_profile.middle([dense, sparse, sparse]) == sparse
