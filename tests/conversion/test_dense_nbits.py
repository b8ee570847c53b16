"""Dense models exported quantized, by ONNX Runtime's operator and by ours, against transformers."""

from pathlib import Path

import pytest
import torch

from benchmarks.cpu import engine_runner
from conversion.errors import InputError
from conversion.onnx import export
from conversion.onnx.dense_nbits import DenseQuantization
from conversion.quantization.formats import FP8, INT4, INT8, Quantization
from tests.conversion.models import CONFIGS, make_model

WINDOW = torch.arange(48).mul(37).add(11).remainder(97)
CASES = {
    "ort int8": (DenseQuantization(Quantization(INT8, 32), "MatMulNBits"), None, 0.005),
    "ort int4": (DenseQuantization(Quantization(INT4, 32), "MatMulNBits"), None, 0.1),
    "ours int8": (DenseQuantization(Quantization(INT8, None)), Quantization(INT8, None), 0.005),
    "ours int4": (DenseQuantization(Quantization(INT4, 32)), Quantization(INT8, None), 0.1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_quantized_dense_model_says_what_the_dense_one_does(case: str, family: str, tmp_path: Path) -> None:
    dense, embedding, tolerance = CASES[case]
    model = make_model(CONFIGS[family], sparse=False)
    model.save_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logits = model(WINDOW[None]).logits[0, :-1].double()
    expected = logits.log_softmax(1).gather(1, WINDOW[1:, None]).sum().item()
    export(tmp_path / "hf", tmp_path / "plain")
    assert engine_runner.score(tmp_path / "plain", 1, [WINDOW.tolist()]) == pytest.approx(expected, rel=1e-5)
    export(tmp_path / "hf", tmp_path / "onnx", dense=dense, embedding=embedding)
    assert engine_runner.score(tmp_path / "onnx", 1, [WINDOW.tolist()]) == pytest.approx(expected, rel=tolerance)
    graph = (tmp_path / "onnx" / "model.onnx").read_bytes()
    assert graph.count(dense.operator.encode()) >= 2 * 6  # every linear of both blocks
    assert b"Sparse24" not in graph


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(tmp_path / "sparse")
    with pytest.raises(InputError, match="is 2:4: quantize it as a packed checkpoint"):
        export(tmp_path / "sparse", tmp_path / "out", dense=DenseQuantization(Quantization(INT8, None)))
    with pytest.raises(InputError, match="name a group size"):
        DenseQuantization(Quantization(INT8, None), "MatMulNBits")
    with pytest.raises(InputError, match="use int8 or int4"):
        DenseQuantization(Quantization(FP8, None))
