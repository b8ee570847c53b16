"""Dense models exported quantized, by ONNX Runtime's operator and by ours, against transformers."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.cpu import engine_runner
from benchmarks.cpu.steps import Steps
from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_model
from conversion.errors import InputError
from conversion.onnx import export
from conversion.onnx.dense_nbits import DenseQuantization
from conversion.quantization.calibrated import calibrated_codes, scope_modules
from conversion.quantization.formats import FP8, INT4, INT8, Quantization
from conversion.quantization.quantize import quantize_model
from tests.cast_train.tiny import tokenizer, write_text
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


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
def test_calibration_text_rounds_a_dense_model_as_it_does_a_sparse_one(family: str, tmp_path: Path) -> None:
    make_model(CONFIGS[family], sparse=False).save_pretrained(tmp_path / "hf")
    tokenizer().save_pretrained(tmp_path / "hf")
    write_text(tmp_path / "text.txt")
    source, int4 = Checkpoint(tmp_path / "hf"), Quantization(INT4, 32)

    def logits_of(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return model(WINDOW[None]).logits[0]

    nearest, calibrated = dense_model(source), dense_model(source)
    for _ in quantize_model(nearest, scope_modules(nearest, source).values(), int4, None, sparse=False):
        pass
    calibrated_codes(calibrated, source, int4, [tmp_path / "text.txt"], sparse=False)
    expected = logits_of(calibrated)
    dense = DenseQuantization(int4, calibration=(tmp_path / "text.txt",))
    export(tmp_path / "hf", tmp_path / "onnx", dense=dense)
    found = torch.from_numpy(Steps(tmp_path / "onnx", 1, sequences=1, tokens=48).run(WINDOW[None].numpy(), 0))
    # activations are rounded to 8 bits, which is little beside what separates the two ways to round to 4
    assert (found - expected).norm() < 0.3 * (logits_of(nearest) - expected).norm()


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(tmp_path / "sparse")
    with pytest.raises(InputError, match="is 2:4: quantize it as a packed checkpoint"):
        export(tmp_path / "sparse", tmp_path / "out", dense=DenseQuantization(Quantization(INT8, None)))
    with pytest.raises(InputError, match="name a group size"):
        DenseQuantization(Quantization(INT8, None), "MatMulNBits")
    with pytest.raises(InputError, match="use int8 or int4"):
        DenseQuantization(Quantization(FP8, None))
    with pytest.raises(InputError, match="leave calibration text out"):
        DenseQuantization(Quantization(INT4, 32), "MatMulNBits", (tmp_path / "text.txt",))
