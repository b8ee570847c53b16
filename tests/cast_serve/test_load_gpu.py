"""`cast_serve.load` for a GPU, with the emulation and Triton's interpreter in the GPU's place."""

from pathlib import Path

import pytest
import torch

import cast_serve
from cast_serve.kernels.cuda import torch_ops
from cast_serve.torch_model import modules
from cast_serve.torch_model.gpu_linear import QUANTIZED, SPARSE, GpuQuantizedLinear, GpuSparseLinear
from conversion.quantization.formats import FP8, INT4, Quantization
from tests.cast_serve.conftest import Interpreted
from tests.cast_serve.test_load import INT8_ROWS, TOKENS, relative_error
from tests.conversion.models import packed


@pytest.fixture
def in_place_of_the_gpu(emulated_gpu: None, interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks a tensor or a device whether it is a GPU's is answered yes."""
    interpreted("cast_serve.kernels.cuda.triton_dense")
    monkeypatch.setattr(modules, "prepack_quantized", torch_ops.prepack_quantized)
    monkeypatch.setitem(SPARSE, "cpu", GpuSparseLinear)
    monkeypatch.setitem(QUANTIZED, "cpu", GpuQuantizedLinear)


@pytest.mark.usefixtures("in_place_of_the_gpu")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("quantization", "embedding"),
    [(None, None), (INT8_ROWS, None), (Quantization(INT4, 64), INT8_ROWS), (None, Quantization(INT4, 32))],
    ids=["float", "int8", "int4-int8", "float-int4"],
)
def test_the_gpus_layers_give_the_dense_models_logits(
    name: str, quantization: Quantization | None, embedding: Quantization | None, tmp_path: Path
) -> None:
    directory = packed(tmp_path, name, quantization=quantization, embedding=embedding)
    model = cast_serve.load(directory, dtype=torch.float32)
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, modules.PackedLinear)}
    lm_head = {"QuantizedLinear"} if embedding else set()
    assert kinds == {"GpuSparseLinear" if quantization is None else "GpuQuantizedLinear"} | lm_head
    assert 1e-5 < relative_error(directory, model(TOKENS).logits) < 0.05  # x in 16 bits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantization", [None, INT8_ROWS, Quantization(INT4, 64), Quantization(FP8, None)])
def test_on_a_gpu(quantization: Quantization | None, tmp_path: Path) -> None:
    directory = packed(tmp_path, "llama", quantization=quantization, embedding=INT8_ROWS)
    model = cast_serve.load(directory, device="cuda")
    assert model.device.type == "cuda"
    assert model.dtype == torch.bfloat16
    assert relative_error(directory, model(TOKENS.cuda()).logits.cpu()) < 0.05
