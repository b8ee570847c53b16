"""The export for TensorRT, run by ONNX Runtime's own CPU kernels: the logits, and the 2:4 weights in the file."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from typer.testing import CliRunner

from cast_serve.cli import build_app
from conversion.dense_model import dense_model
from conversion.errors import InputError
from conversion.onnx.tensorrt import export_tensorrt
from conversion.packed_checkpoint import PackedCheckpoint
from conversion.quantization.formats import INT8, Quantization
from tests.conversion.models import CONFIGS, make_model, packed


def is_24(weight: np.ndarray) -> bool:
    """Whether of four consecutive values of the first axis, K, at most two are not zero."""
    return bool(((weight.reshape(-1, 4, weight.shape[1]) != 0).sum(1) <= 2).all())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_and_weights(name: str, dtype: str, tmp_path: Path) -> None:
    directory = packed(tmp_path, name)
    export_tensorrt(directory, tmp_path / "out", dtype)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    ids, mask = torch.randint(97, (3, 17)), torch.ones(3, 17, dtype=torch.long)
    mask[0, :5] = 0
    (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    checkpoint = PackedCheckpoint(directory)
    with torch.no_grad():
        exact = dense_model(checkpoint, torch.float32)(input_ids=ids, attention_mask=mask).logits.numpy()
    error = np.abs(logits - exact)[mask.numpy() == 1].max() / np.abs(exact).max()
    assert error < (1e-5 if dtype == "float32" else 1e-2)

    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert {node.domain for node in graph.node} == {""}  # what TensorRT knows
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    matrices = []
    for node in products:
        if (weight := weights.get(node.input[1])) is not None:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            matrices.append(weight.T if transposed else weight)
    assert all(weight.dtype == dtype for weight in matrices)
    assert sum(is_24(weight) for weight in matrices) == len(checkpoint.sparse_layers) == len(matrices) - 1  # lm_head


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_the_providers_are_what_onnx_runtime_takes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = packed(tmp_path, "llama")
    result = CliRunner().invoke(
        build_app(), ["convert", str(directory), str(tmp_path / "out"), "--to", "tensorrt"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    providers = json.loads((tmp_path / "out" / "providers.json").read_text())
    onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=list(providers.items()))
    assert "EP Error" not in capfd.readouterr().out  # which is how it says that it does not understand them
    options = providers["TensorrtExecutionProvider"]
    assert set(providers) <= set(onnxruntime.get_all_providers())
    assert options["trt_sparsity_enable"] == "1"
    assert options["trt_profile_max_shapes"] == "input_ids:8x64,attention_mask:8x64"
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_tensorrt_would_not_run_sparse_is_refused(tmp_path: Path) -> None:
    make_model(CONFIGS["llama"], sparse=False).save_pretrained(tmp_path / "dense")
    directory = packed(tmp_path, "llama", quantization=Quantization(INT8, None))
    with pytest.raises(InputError, match="TensorRT would run it dense"):
        export_tensorrt(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(InputError, match="is quantized"):
        export_tensorrt(directory, tmp_path / "out")
    with pytest.raises(InputError, match="use float16 or float32"):
        export_tensorrt(tmp_path / "model", tmp_path / "out", "bfloat16")
    large = make_model(CONFIGS["llama"], sparse=True)
    large.model.embed_tokens.weight.data[3, 4] = 1e6
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(InputError, match="beyond float16"):
        export_tensorrt(tmp_path / "large", tmp_path / "out")
    assert not (tmp_path / "out").exists()
