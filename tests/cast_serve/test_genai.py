"""The GPU's operator in ONNX Runtime and the export for onnxruntime-genai, in the CPU provider with a fake CUDA driver.

All is real but the GPU: the graph, its weights and code, the operator and how it cuts a call into blocks, and the
kernels' own source, which the driver runs in the emulation of mma.sp.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import PretrainedConfig
from typer.testing import CliRunner

import conversion
from cast_serve.cli import build_app
from cast_serve.genai.export import export_genai
from cast_serve.genai.gpu_matmul import ARCHITECTURE
from cast_serve.kernels import library_path
from cast_serve.kernels.cuda import nvrtc, tiled, weight_only
from cast_serve.kernels.cuda.layout import to_fragments
from cast_serve.kernels.cuda.plan import Types
from cast_serve.kernels.cuda.random_weights import QuantizedWeight
from cast_serve.kernels.cuda.small_m import MAX_ROWS, plan
from cast_serve.kernels.cuda.source import linear_kernels, source
from conversion.dense_model import dense_model
from conversion.errors import InputError
from conversion.packed_checkpoint import PackedCheckpoint, open_checkpoint
from conversion.quantization.formats import FP8, INT4, INT8, Quantization
from tests.cast_serve.cuda_emulation.runner import Emulation
from tests.cast_serve.fake_cuda.build import MULTIPROCESSORS, FakeCuda
from tests.cast_serve.sparse_layers import random_layer
from tests.conversion.models import CONFIGS, make_model, packed


def code_of(weight: str) -> bytes:
    """What the operator and the fake driver read of PTX."""
    names = ["expand", *(kernel.entry.name for kernel in reversed(linear_kernels(Types(weight, "Fp16"))))]
    return "".join(["//\n", *(f".visible .entry {name}(\n" for name in names)]).encode()


FORMATS = {"Fp16": None, "W8": Quantization(INT8, None), "W4": Quantization(INT4, 64), "F8": Quantization(FP8, None)}


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory, emulation: Emulation) -> FakeCuda:
    return FakeCuda(tmp_path_factory.mktemp("cuda"), emulation)


@pytest.fixture
def use_types(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(weight: str) -> None:
        monkeypatch.setenv("FAKE_CUDA_TYPES", f"{weight}_Fp16")

    return use


def session(
    operators: Path,
    weight: torch.Tensor,
    code: bytes,
    bias: torch.Tensor | None,
    provider: str = "CPUExecutionProvider",
    **attributes: int,
) -> onnxruntime.InferenceSession:
    """A graph x -> y of the operator alone."""
    initializers = [
        numpy_helper.from_array(weight.view(torch.uint8).numpy(), "weight"),
        numpy_helper.from_array(np.frombuffer(code, np.uint8), "code"),
    ]
    names = ["x", "weight", "code"]
    if bias is not None:
        initializers.append(numpy_helper.from_array(bias.numpy(), "bias"))
        names.append("bias")
    node = helper.make_node("Sparse24MatMulGpu", names, ["y"], domain="cast24", **attributes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in "xy")
    graph = helper.make_graph([node], "graph", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("cast24", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(operators))
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])


@pytest.mark.parametrize("weight", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(40, 72), (64, 1152), (200, 640)])
def test_the_operator(weight: str, N: int, K: int, cuda: FakeCuda, use_types: Callable[[str], None]) -> None:
    use_types(weight)
    quantization, types = FORMATS[weight], Types(weight, "Fp16")
    attributes = {"N": N, "K": K, "bits": 16}
    if quantization is None:
        layer = random_layer(N, K, torch.float16)
        parts = [part.view(torch.uint8).flatten() for part in to_fragments(layer.values, layer.bitmask)]
        stored, dense = torch.cat(parts), layer.dense.double()
    else:
        random = QuantizedWeight(N, K, quantization.values, quantization.group_size, torch.device("cpu"))
        attributes |= {"bits": quantization.values.bits, "group_size": quantization.group_size or 0}
        of = random.stored, random.bitmask, random.scale
        stored, dense = weight_only.packed_in_fragments(*of, quantization.group_size), random.dense.double()
    for bias in (None, torch.randn(N).half()):
        run = session(cuda.operators, stored, code_of(weight), bias, **attributes)
        cuda.launches()
        splits = []
        for shape in [(1,), (3, 5), (2, 20), (130,)]:
            x = torch.randn(*shape, K).half()
            (y,) = run.run(None, {"x": x.numpy()})
            exact = x.double() @ dense.T + (0 if bias is None else bias.double())
            assert y.dtype == np.float16
            assert y.shape == (*shape, N)
            error = (torch.from_numpy(y).double() - exact).abs().max() / exact.abs().max()
            assert error < 2e-3
            M = x.shape[:-1].numel()
            cut = plan(M, N, K, MULTIPROCESSORS) if M <= MAX_ROWS else tiled.plan(M, N, K, MULTIPROCESSORS, types)
            assert cuda.launches() == [" ".join([cut.kernel.entry.name, *map(str, cut.grid)])]
            splits.append(cut.splits)
        assert (max(splits) > 1) == (K > 128)
        (y,) = run.run(None, {"x": np.zeros((2, 0, K), np.float16)})
        assert y.shape == (2, 0, N)


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs a GPU and onnxruntime-gpu"
)
@pytest.mark.parametrize("rows", [1, 9, 40, 300])
def test_the_operator_on_a_gpu(rows: int) -> None:
    N, K = 1032, 2056
    random = QuantizedWeight(N, K, INT4, 64, torch.device("cpu"))
    stored = weight_only.packed_in_fragments(random.stored, random.bitmask, random.scale, 64)
    code = nvrtc.compile_source(source(Types("W4", "Fp16")), ARCHITECTURE).code
    attributes = {"N": N, "K": K, "bits": 4, "group_size": 64}
    run = session(library_path(), stored, code, torch.zeros(N).half(), "CUDAExecutionProvider", **attributes)
    for _ in range(3):
        x = torch.randn(rows, K).half()
        (y,) = run.run(None, {"x": x.numpy()})
        exact = x.double() @ random.dense.double().T
        assert (torch.from_numpy(y).double() - exact).abs().max() / exact.abs().max() < 2e-3


def test_what_does_not_fit_is_refused(cuda: FakeCuda, use_types: Callable[[str], None]) -> None:
    use_types("Fp16")
    layer = random_layer(32, 64, torch.float16)
    stored = torch.cat([part.view(torch.uint8).flatten() for part in to_fragments(layer.values, layer.bitmask)])
    code, x = code_of("Fp16"), {"x": np.zeros((1, 64), np.float16)}
    with pytest.raises(Exception, match=r"weight has shape \[2303\], expected \[2304\]"):
        session(cuda.operators, stored[:-1], code, None, N=32, K=64, bits=16).run(None, x)
    with pytest.raises(Exception, match=r"bias has shape \[31\], expected \[32\]"):
        session(cuda.operators, stored, code, torch.zeros(31).half(), N=32, K=64, bits=16).run(None, x)
    with pytest.raises(Exception, match=r"x has shape \[1, 72\], expected \[..., 64\]"):
        session(cuda.operators, stored, code, None, N=32, K=64, bits=16).run(None, {"x": np.zeros((1, 72), np.float16)})
    with pytest.raises(Exception, match="the code has no kernel small_m_"):
        session(cuda.operators, stored, b".entry expand(", None, N=32, K=64, bits=16).run(None, x)
    for wrong, message in [({"K": 60}, "K a positive"), ({"bits": 2}, "bits must"), ({"group_size": 32}, "group_size")]:
        with pytest.raises(Exception, match=message):
            session(cuda.operators, stored, code, None, **{"N": 32, "K": 64, "bits": 16} | wrong)


def of_16_column_heads(name: str) -> PretrainedConfig:
    """A test model's config in a size that ONNX Runtime's attention on CPUs takes."""
    config = CONFIGS[name]
    if name in ("gpt2", "opt"):
        return config
    return type(config)(**config.to_dict() | {"hidden_size": 64, "head_dim": 16})


def run_exported(directory: Path, operators: Path, ids: torch.Tensor, prompt: int) -> np.ndarray:
    """Logits [B, S, V] of a prompt, and then of one token after the other."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(operators))
    run = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in run.get_inputs()]
    caches = {
        value.name: np.zeros((len(ids), value.shape[1], 0, 16 if value.shape[1] == 2 else 8), np.float16)
        for value in run.get_inputs()
        if value.name.startswith("past")
    }
    found = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        given: dict[str, Any] = {
            "input_ids": ids[:, start:end].numpy(),
            "attention_mask": np.ones((len(ids), end), np.int64),
        }
        if "position_ids" in names:
            given["position_ids"] = np.arange(start, end)[None].repeat(len(ids), 0)
        logits, *present = run.run(None, given | caches)
        outputs = [value.name for value in run.get_outputs()][1:]
        caches = {
            f"past_key_values.{name.removeprefix('present.')}": value
            for name, value in zip(outputs, present, strict=True)
        }
        found.append(logits)
    return np.concatenate(found, 1)


# Qwen3's attention is CUDA's alone
@pytest.mark.parametrize(
    ("name", "weight"),
    [*((name, "Fp16") for name in CONFIGS if name != "qwen3"), ("llama", "W8"), ("gpt2", "W4"), ("mistral", "F8")],
)
def test_logits(name: str, weight: str, cuda: FakeCuda, use_types: Callable[[str], None], tmp_path: Path) -> None:
    use_types(weight)
    make_model(of_16_column_heads(name), sparse=True).save_pretrained(tmp_path / "model")
    conversion.save_packed(tmp_path / "model", tmp_path / "packed", quantization=FORMATS[weight])
    operators = export_genai(tmp_path / "packed", tmp_path / "out")
    checkpoint = PackedCheckpoint(tmp_path / "packed")
    ids = torch.randint(97, (2, 12))
    cuda.launches()
    logits = run_exported(tmp_path / "out", cuda.operators, ids, prompt=9)
    assert len(cuda.launches()) == 4 * operators
    with torch.no_grad():
        exact = dense_model(checkpoint, torch.float32)(input_ids=ids).logits.numpy()
    assert np.abs(logits - exact).max() / np.abs(exact).max() < 1e-2
    stored = {
        each.name for each in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer
    }
    assert ("lm_head.MatMul.weight" in stored) != checkpoint.config["tie_word_embeddings"]


def test_a_model_in_onnxruntime_genai(cuda: FakeCuda, use_types: Callable[[str], None], tmp_path: Path) -> None:
    """Generation by the runtime that the export is for, from the directory as it is but for provider and library."""
    use_types("Fp16")
    make_model(of_16_column_heads("llama"), sparse=True).save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(
        build_app(), ["export-genai", str(tmp_path / "model"), str(tmp_path / "out")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert "10 linears of 2:4 weights" in result.output
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    session_options = config["model"]["decoder"]["session_options"]
    assert list(session_options["provider_options"][0]) == ["cuda"]
    (tmp_path / "out" / session_options["custom_ops_library"]).write_bytes(cuda.operators.read_bytes())
    session_options["provider_options"] = []
    (tmp_path / "out" / "genai_config.json").write_text(json.dumps(config))
    model = onnxruntime_genai.Model(str(tmp_path / "out"))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=14, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    prompt = [3, 1, 4, 1, 5, 9, 26]  # the runtime takes 2, the padding, out
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    exact = dense_model(open_checkpoint(tmp_path / "model"), torch.float32)
    expected = exact.generate(torch.tensor([prompt]), max_length=14, do_sample=False)
    assert list(generator.get_sequence(0)) == expected[0].tolist()


def test_the_code_in_the_file_is_the_kernels(tmp_path: Path) -> None:
    directory = packed(tmp_path, "qwen3", quantization=Quantization(INT4, 64))
    assert export_genai(directory, tmp_path / "out") == 10
    model = onnx.load(tmp_path / "out" / "model.onnx")
    code = next(each for each in model.graph.initializer if each.name == "cast24.kernels")
    text = numpy_helper.to_array(code).tobytes().decode()
    assert text == nvrtc.compile_source(source(Types("W4", "Fp16")), ARCHITECTURE).code.rstrip(b"\0").decode()
    for kernel in linear_kernels(Types("W4", "Fp16")):
        assert f".entry {kernel.entry.name}(" in text
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert [node.input[1] for node in products] == ["lm_head.MatMul.weight"]
    stored = {each.name: numpy_helper.to_array(each).nbytes for each in model.graph.initializer}
    dense = sum(value for name, value in stored.items() if "MatMul.weight" in name)
    assert dense == stored["lm_head.MatMul.weight"]


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(CONFIGS["llama"], sparse=False).save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="only 2:4 models have kernels"):
        export_genai(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(InputError, match="multiple of 64 columns, and 32 is not"):
        export_genai(packed(tmp_path, "llama", quantization=Quantization(INT4, 32)), tmp_path / "out")
    large = make_model(CONFIGS["llama"], sparse=True)
    large.model.embed_tokens.weight.data[3, 4] = 1e6
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(InputError, match="beyond float16"):
        export_genai(tmp_path / "large", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(InputError, match="need NVRTC"):
        export_genai(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
