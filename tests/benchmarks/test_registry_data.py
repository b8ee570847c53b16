"""Files come out of packages checked, and text out of files clean."""

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from benchmarks.registry import packages, sources, zero_shot
from benchmarks.registry.__main__ import app
from benchmarks.registry.model import model_from_gguf
from benchmarks.registry.overlap import quoting
from benchmarks.registry.packages import Package, Registry, fetch
from conversion.errors import InputError
from tests.cast_train.tiny import tokenizer
from tests.conversion.models import CONFIGS, make_model


def serve(monkeypatch: pytest.MonkeyPatch, registry: Registry, archive: Path) -> Package:
    """Let `registry` hand out the one file `archive`."""
    monkeypatch.setitem(packages._DOWNLOAD, registry, lambda package: ["cp", str(archive), "."])
    return Package(registry, "some-package", "1.0", hashlib.sha256(archive.read_bytes()).hexdigest(), "any")


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def make_tgz(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_only_the_wanted_files_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"package/a/one.txt": b"1", "package/b.bin": b"2"}
    wheel = serve(monkeypatch, "pypi", make_wheel(tmp_path / "p.whl", files))
    tgz = serve(monkeypatch, "npm", make_tgz(tmp_path / "p.tgz", files))
    for package in (wheel, tgz):
        out = tmp_path / package.registry
        fetch(package, out, "*.txt")
        assert [path.relative_to(out).as_posix() for path in out.rglob("*.*")] == ["package/a/one.txt"]
    with pytest.raises(InputError, match="holds no file"):
        fetch(wheel, tmp_path / "none", "*.json")


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = serve(monkeypatch, "pypi", make_wheel(tmp_path / "p.whl", {"a": b"1"}))
    make_wheel(tmp_path / "p.whl", {"a": b"changed"})
    with pytest.raises(InputError, match="SHA-256"):
        fetch(package, tmp_path / "out", "*")
    assert not (tmp_path / "out").exists()


def test_a_path_out_of_the_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = serve(monkeypatch, "npm", make_tgz(tmp_path / "p.tgz", {"../evil": b"1"}))
    with pytest.raises(InputError, match="outside"):
        fetch(package, tmp_path / "out", "*")
    assert not (tmp_path / "evil").exists()


def test_quoting_finds_thirteen_words_in_a_row() -> None:
    training = ["x " + " ".join(f"w{i}" for i in range(20)) + " y"]
    quote, shorter = " ".join(f"W{i}," for i in range(3, 16)), " ".join(f"w{i}" for i in range(3, 15))
    assert quoting([f"{shorter} other end", f"so: {quote} end"], training) == {1}


def test_brown_is_running_text(tmp_path: Path) -> None:
    (tmp_path / "ca01").write_text(
        "\n\n\tThe/at jury/nn ,/, he/pps said/vbd ,/, ``/`` won't/md* go/vb ''/'' (/( now/rb )/) ./.\nYes/rb ./.\n"
        "\n\n\tAnd/cc //in or/cc\n"
    )
    assert list(sources.brown(tmp_path)) == ['The jury, he said, "won\'t go" (now). Yes.\n\nAnd / or']


def test_html_is_its_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<html><head><title>no</title></head><body><h1>A  b</h1><p>one <i>two</i>\nthree</p></body></html>"
    )
    assert list(sources.html_pages(tmp_path)) == ["A b\n\none two three"]


def test_wordnet_is_words_and_glosses(tmp_path: Path) -> None:
    (tmp_path / "data.adj").write_text(
        '  1 licence\n00001740 00 a 02 able(p) 0 very_able 0 005 = 05 n 0000 | having means; "able to"  \n'
    )
    assert list(sources.wordnet(tmp_path)) == ['able, very able: having means; "able to"']


def write_requests(path: Path, docs: list[dict]) -> None:
    """As in the package: a row for each choice, then once more without the question, ids from a million on."""
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        for base in (0, 1_000_000):
            for number, doc in enumerate(docs):
                for choice in range(2):
                    row = {"doc": doc, "doc_id": base + number, "idx": choice, "request": {}}
                    file.write(json.dumps(row) + "\n")


def test_boolq_paragraphs_stand_once(tmp_path: Path) -> None:
    docs = [{"query": f"Title -- Text {i // 2}.\nQuestion: q{i}?\nAnswer:"} for i in range(4)]
    write_requests(tmp_path / "x" / "requests.jsonl.gz", docs)
    assert list(sources.boolq(tmp_path)) == ["Text 0.\n\nText 1."]


def test_a_test_set_becomes_rows_of_the_stock_task(tmp_path: Path) -> None:
    docs = [{"query": "Question: Which?\nAnswer:", "choices": ["this", "that"], "gold": 1}]
    package = tmp_path / "package"
    write_requests(package / "p/arc_easy/test_rc_5shot/requests.jsonl.gz", docs)
    stock = tmp_path / "stock"
    (stock / "arc").mkdir(parents=True)
    (stock / "arc/arc_easy.yaml").write_text("task: arc_easy\n")
    (test_set,) = (test_set for test_set in zero_shot.TEST_SETS if test_set.name == "arc_easy")
    zero_shot._write_task(test_set, package, stock, tmp_path / "arc_easy")
    row = {"question": "Which?", "choices": {"text": ["this", "that"], "label": ["A", "B"]}, "answerKey": "B"}
    assert json.loads((tmp_path / "arc_easy/data.json").read_text()) == row
    task = json.loads((tmp_path / "arc_easy/arc_easy.yaml").read_text())
    assert task["dataset_kwargs"]["data_files"] == {"test": "arc_easy/data.json"}
    assert (tmp_path / "arc_easy" / task["include"]).read_text() == "task: arc_easy\n"


def test_a_gguf_file_is_put_together_from_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokenizer()
    read: list[bytes] = []

    def from_pretrained(directory: str, gguf_file: str, **others: Any) -> Any:
        read.append((Path(directory) / gguf_file).read_bytes())
        return make_model(CONFIGS["llama"], sparse=False) if others else tokens

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    parts = [tmp_path / "part-aa", tmp_path / "part-ab"]
    for part, content in zip(parts, (b"GGUF12", b"34"), strict=True):
        part.write_bytes(content)
    with pytest.raises(InputError, match="part-ab does not begin a GGUF file"):
        model_from_gguf(parts[::-1], tmp_path / "model")
    with pytest.raises(InputError, match=r"no file .*part-ac"):
        model_from_gguf([*parts, tmp_path / "part-ac"], tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-aa", "part-ab"]
    result = CliRunner().invoke(app, ["from-gguf", str(tmp_path / "model"), *map(str, parts)])
    assert result.exit_code == 0, result.exception
    assert read == [b"GGUF1234"] * 2
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "model").iterdir()}
