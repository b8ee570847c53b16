"""`cast convert` and `cast info` as a user meets them."""

import json

import pytest
import typer
from typer.testing import CliRunner

from conversion.cli import convert, info
from conversion.errors import InputError
from conversion.inspection import inspect_directory
from tests.conversion.models import CONFIGS, make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model, a 2:4 one, and that packed and exported."""
    root = tmp_path_factory.mktemp("models")
    make_model(CONFIGS["llama"], sparse=False).save_pretrained(root / "dense")
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(root / "sparse")
    assert run("convert", root / "sparse", root / "packed", "--to", "packed", "--verify").exit_code == 0
    assert run("convert", root / "packed", root / "onnx", "--to", "onnx", "--value-dtype", "bfloat16").exit_code == 0
    return root


def run(*arguments):
    app = typer.Typer()
    app.command("convert")(convert)
    app.command("info")(info)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_convert_says_what_it_verified(models, tmp_path):
    result = run("convert", models / "sparse", tmp_path / "packed", "--verify")
    assert result.exit_code == 0
    assert "14 linears are exactly 2:4" in result.stdout
    assert "bit for bit" in result.stdout


def test_convert_refuses_a_dense_model_and_leaves_nothing(models, tmp_path):
    result = run("convert", models / "dense", tmp_path / "packed")
    assert isinstance(result.exception, InputError)
    assert "row 0, group 0" in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["packed", "onnx"])
def test_convert_overwrites_only_when_told(models, tmp_path, target):
    (tmp_path / "out").mkdir()
    arguments = ("convert", models / "sparse", tmp_path / "out", "--to", target)
    assert "already exists" in str(run(*arguments).exception)
    assert run(*arguments, "--overwrite").exit_code == 0


def test_convert_verifies_packed_checkpoints_only(models, tmp_path):
    assert isinstance(
        run("convert", models / "sparse", tmp_path / "x", "--to", "onnx", "--verify").exception, InputError
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dense", "dense"), ("sparse", "2:4 stored dense"), ("packed", "packed 2:4"), ("onnx", "onnx 2:4")],
)
def test_info_tells_every_kind_apart(models, name, kind):
    result = run("info", models / name)
    assert result.exit_code == 0
    found = json.loads(run("info", models / name, "--json").stdout)
    assert found["kind"] == kind
    assert found["model_type"] == "llama"
    assert found["value_dtype"] == ("bfloat16" if name == "onnx" else "float32")


def test_info_counts_zeros_violations_and_bytes(models):
    dense, sparse = inspect_directory(models / "dense"), inspect_directory(models / "sparse")
    packed = inspect_directory(models / "packed")
    in_scope = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 56 * 32)
    assert [layer.name for layer in dense.layers] == [layer.name for layer in packed.layers]
    assert dense.violations == in_scope // 4
    assert sparse.violations == packed.violations == 0
    assert sparse.sparsity == packed.sparsity == pytest.approx(0.5)
    assert dense.linear_dense_bytes == packed.linear_dense_bytes == 4 * in_scope
    assert packed.linear_packed_bytes == 4 * in_scope * 0.5 + in_scope / 8
    assert packed.stored_bytes == packed.linear_packed_bytes + packed.other_bytes
    assert packed.packed_ratio == pytest.approx(packed.stored_bytes / sparse.stored_bytes)


def test_info_refuses_what_is_no_model(tmp_path):
    assert isinstance(run("info", tmp_path / "nowhere").exception, InputError)
