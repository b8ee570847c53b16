"""Exported graphs against transformers, on ragged batches over two steps."""

import copy
import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from ml_dtypes import bfloat16
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from cast_serve.kernels import isa, library_path
from conversion import save_packed
from conversion.dense_model import dense_model
from conversion.errors import InputError
from conversion.fingerprint import source_fingerprint
from conversion.onnx import GRAPH, export
from conversion.packed_checkpoint import open_checkpoint
from conversion.quantization.formats import FP8, INT4, INT8, Quantization
from tests.conversion.models import CONFIGS, make_model
from tests.conversion.reference_ops import evaluator

BLOCK_SIZE = 16
PROMPTS = [[5, 17, 3, 88, 41, 2, 60, 8, 93, 55, 20, 1, 76, 30, 62, 9, 44, 81, 7], [9], [33, 12, 71, 4]]
NEXT = [[7, 11], [13], [54]]


def run_steps(directory, run):
    """Prefill three sequences at once, then feed each some more tokens; logits of every token, per sequence."""
    manifest = json.loads((directory / "cast_onnx.json").read_text())
    shape = (12, BLOCK_SIZE, manifest["kv_num_heads"], manifest["head_dim"])
    dtype = {"float32": np.float32, "bfloat16": bfloat16}[manifest["cache_dtype"]]
    caches = {name: np.full(shape, np.nan).astype(dtype) for name in manifest["inputs"] if "_cache." in name}
    table = np.array([[7, 2, 11], [4, 0, 1], [9, 3, 5]], np.int32)
    past = np.zeros(3, np.int32)
    logits = [[], [], []]
    for step in (PROMPTS, NEXT):
        lengths = np.array([len(tokens) for tokens in step])
        feeds = {
            "input_ids": np.array([[token for tokens in step for token in tokens]]),
            "position_ids": np.concatenate([np.arange(n) + p for n, p in zip(lengths, past, strict=True)])[None],
            "block_table": table,
            "past_lens": past,
            "cu_seqlens": np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
            "logits_rows": np.arange(lengths.sum()),
            **caches,
        }
        (out,) = run({name: feeds[name] for name in manifest["inputs"]})
        assert out.shape == (1, lengths.sum(), manifest["vocab_size"])
        for sequence, rows in enumerate(np.split(out[0], lengths.cumsum()[:-1])):
            logits[sequence].append(rows)
        past = past + lengths.astype(np.int32)
    return [np.concatenate(rows) for rows in logits]


def expected_logits(model):
    with torch.no_grad():
        return [
            model(torch.tensor([prompt + more])).logits[0].float().numpy()
            for prompt, more in zip(PROMPTS, NEXT, strict=True)
        ]


def reference(directory):
    session = evaluator(onnx.load(directory / "model.onnx"))
    return lambda feeds: session.run(["logits"], feeds)


def onnxruntime(directory):
    """The real thing: ONNX Runtime with the kernel library, which writes the caches in place."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])

    def run(feeds):
        binding = session.io_binding()
        for name, array in feeds.items():
            if array.dtype == bfloat16:
                bits, number = array.view(np.uint16), onnx.TensorProto.BFLOAT16
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, number))
            else:
                binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()

    return run


def save(model, directory):
    model.save_pretrained(directory)
    return directory


def assert_same_logits(directory, runner, model, tolerance=2e-4):
    logits = run_steps(directory, runner(directory))
    for ours, theirs in zip(logits, expected_logits(model), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def manifest_of(directory):
    return json.loads((directory / "cast_onnx.json").read_text())


def initializers(directory):
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    return {tensor.name: tensor for tensor in graph.initializer}


@pytest.fixture(scope="module")
def sparse_llama(tmp_path_factory):
    return save(make_model(CONFIGS["llama"], sparse=True), tmp_path_factory.mktemp("llama") / "model")


def linears(name):
    """Of two blocks: qkv, output, and gate and up, which share an operator where panels of them are whole, and down."""
    return 8 if name in ("gpt2", "opt") or CONFIGS[name].intermediate_size % 16 == 0 else 10


@pytest.mark.parametrize("runner", [reference, onnxruntime])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, sparse, runner, tmp_path):
    model = make_model(CONFIGS[name], sparse=sparse)
    export(save(model, tmp_path / "model"), tmp_path / "onnx")
    assert_same_logits(tmp_path / "onnx", runner, model)

    manifest = manifest_of(tmp_path / "onnx")
    ops = [node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node]
    assert manifest["pattern"] == ("2:4" if sparse else "dense")
    assert manifest["sparse_layers"] == ops.count("Sparse24MatMul") == (sparse and linears(name))
    if sparse and name not in ("gpt2", "opt"):
        assert not {op for op in ops if op.startswith("Skip")}
        assert ops.count("SimplifiedLayerNormalization") == 1 + (
            2 * 2 if name == "qwen3" else 0
        )  # the last; queries, keys
        assert ops.count("Sigmoid") == (0 if linears(name) == 8 else 2)
    assert ops.count("PagedAttention") == 2
    assert (ops.count("MatMul") == 0) == sparse
    assert "GroupQueryAttention" not in ops
    assert "attention_mask" not in manifest["inputs"]
    assert ("position_ids" in manifest["inputs"]) == (name in ("gpt2", "opt"))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_whole_heads_are_rotated_as_by_transformers_whatever_the_config_says(name, tmp_path):
    config = copy.deepcopy(CONFIGS[name])
    config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": 0.5}
    model = make_model(config, sparse=False)
    export(save(model, tmp_path / "model"), tmp_path / "onnx")
    assert_same_logits(tmp_path / "onnx", onnxruntime, model)


@pytest.mark.parametrize("quantization", [Quantization(INT8, None), Quantization(INT4, 32)], ids=["int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_values_are_served_as_they_are(name, quantization, tmp_path):
    source = save(make_model(CONFIGS[name], sparse=True), tmp_path / "model")
    save_packed(source, tmp_path / "packed", quantization=quantization)
    model = dense_model(open_checkpoint(tmp_path / "packed"), torch.float32)
    export(tmp_path / "packed", tmp_path / "exact", float_activations=True)
    assert_same_logits(tmp_path / "exact", onnxruntime, model)

    export(tmp_path / "packed", tmp_path / "rounded", embedding=Quantization(INT8, None))
    rounded = np.concatenate(run_steps(tmp_path / "rounded", onnxruntime(tmp_path / "rounded")))
    expected = np.concatenate(expected_logits(model))
    assert np.linalg.norm(rounded - expected) < 0.05 * np.linalg.norm(expected)
    ops = [node.op_type for node in onnx.load(tmp_path / "rounded" / "model.onnx").graph.node]
    manifest = manifest_of(tmp_path / "rounded")
    assert manifest["sparse_layers"] == ops.count("Sparse24MatMulNBits") == linears(name)
    assert manifest["value_dtype"] == quantization.values.name
    assert ops.count("DenseNBits") == ops.count("EmbeddingNBits") == 1
    assert "MatMul" not in ops
    held = {tensor.name for tensor in initializers(tmp_path / "rounded").values() if len(tensor.dims) == 2}
    tied = model.config.tie_word_embeddings
    assert ("lm_head.panels" in held) == (not tied)
    assert "model.embed_tokens.weight" not in held


@pytest.mark.parametrize("embedding", [Quantization(INT8, None), Quantization(INT4, 32)], ids=["int8", "int4"])
@pytest.mark.parametrize("quantization", [None, Quantization(INT8, None)], ids=["float32", "int8"])
@pytest.mark.parametrize("name", ["llama", "llama-untied-rope3", "gpt2", "opt"])
def test_a_quantized_embedding_is_served_as_it_is_stored(name, quantization, embedding, tmp_path):
    source = save(make_model(CONFIGS[name], sparse=True), tmp_path / "model")
    save_packed(source, tmp_path / "packed", quantization=quantization, embedding=embedding)
    model = dense_model(open_checkpoint(tmp_path / "packed"), torch.float32)
    export(tmp_path / "packed", tmp_path / "exact", float_activations=True)
    assert_same_logits(tmp_path / "exact", onnxruntime, model)
    sizes = {name: tensor.dims for name, tensor in initializers(tmp_path / "exact").items() if "panels" in name}
    assert ("lm_head.panels" in sizes) == (name == "llama-untied-rope3")
    assert "model.embed_tokens.weight" not in initializers(tmp_path / "exact")
    with pytest.raises(InputError, match=f"already {embedding.values.name}: leave --embedding out"):
        export(tmp_path / "packed", tmp_path / "again", embedding=embedding)


def test_eight_bit_floats_have_no_kernel(sparse_llama, tmp_path):
    save_packed(sparse_llama, tmp_path / "packed", quantization=Quantization(FP8, None))
    with pytest.raises(InputError, match="float8_e4m3fn values, for which the CPU has no kernel"):
        export(tmp_path / "packed", tmp_path / "onnx")
    export(tmp_path / "packed", tmp_path / "onnx", "float32")
    assert_same_logits(tmp_path / "onnx", onnxruntime, dense_model(open_checkpoint(tmp_path / "packed"), torch.float32))


def test_only_the_wanted_rows_have_logits(sparse_llama, tmp_path):
    export(sparse_llama, tmp_path / "onnx")
    run = reference(tmp_path / "onnx")
    full = run_steps(tmp_path / "onnx", run)
    lasts = run_steps(tmp_path / "onnx", lambda feeds: last_rows(run, feeds))
    np.testing.assert_array_equal(lasts[1][0], full[1][0])


def last_rows(run, feeds):
    rows = feeds["cu_seqlens"][1:].astype(np.int64) - 1
    (wanted,) = run(feeds | {"logits_rows": rows})
    assert wanted.shape[1] == len(rows)
    padded = np.zeros((1, feeds["input_ids"].shape[1], wanted.shape[2]), np.float32)
    padded[0, rows] = wanted[0]
    return [padded]


def test_packed_and_dense_stored_sources_export_alike(sparse_llama, tmp_path):
    save_packed(sparse_llama, tmp_path / "packed")
    export(sparse_llama, tmp_path / "a")
    export(tmp_path / "packed", tmp_path / "b")
    for file in ("model.onnx", "model.onnx.data", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_bfloat16_values_of_a_float32_model(sparse_llama, tmp_path):
    export(sparse_llama, tmp_path / "onnx", "bfloat16", float_activations=True)
    rounded = make_model(CONFIGS["llama"], sparse=True)
    for layer in rounded.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.bfloat16().float()
    assert_same_logits(tmp_path / "onnx", reference, rounded)
    manifest = manifest_of(tmp_path / "onnx")
    assert manifest["value_dtype"] == "bfloat16"
    values = [t for name, t in initializers(tmp_path / "onnx").items() if name.endswith(".values")]
    assert {tensor.data_type for tensor in values} == {onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize("name", ["llama", "mistral"], ids=["tied", "untied"])
@pytest.mark.parametrize("runner", [reference, onnxruntime])
def test_a_bfloat16_model_stays_bfloat16_where_that_is_exact(name, runner, tmp_path):
    source = save(make_model(CONFIGS[name], sparse=True).bfloat16(), tmp_path / "model")
    export(source, tmp_path / "onnx", float_activations=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    rounds = runner is onnxruntime and isa() == "avx512bf16"  # which rounds inputs to bf16 for bf16 weights
    assert_same_logits(tmp_path / "onnx", runner, model, tolerance=0.02 if rounds else 2e-4)
    tensors = initializers(tmp_path / "onnx")
    assert manifest_of(tmp_path / "onnx")["value_dtype"] == "bfloat16"
    assert tensors["model.embed_tokens.weight"].data_type == onnx.TensorProto.BFLOAT16
    if name == "mistral":
        assert tensors["lm_head.weight"].data_type == onnx.TensorProto.BFLOAT16


@pytest.mark.parametrize("runner", [reference, onnxruntime])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_of_16_bits_have_a_cache_of_16(name, runner, tmp_path):
    source = save(make_model(CONFIGS[name], sparse=True).bfloat16(), tmp_path / "model")
    export(source, tmp_path / "onnx")
    assert manifest_of(tmp_path / "onnx")["cache_dtype"] == "bfloat16"
    inputs = onnx.load(tmp_path / "onnx" / "model.onnx").graph.input
    caches = [value.type.tensor_type.elem_type for value in inputs if "_cache." in value.name]
    assert caches == [onnx.TensorProto.BFLOAT16] * 4
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert_same_logits(tmp_path / "onnx", runner, model, tolerance=0.02)


def test_a_tied_embedding_is_held_once(sparse_llama, tmp_path):
    export(sparse_llama, tmp_path / "onnx")
    large = [name for name, tensor in initializers(tmp_path / "onnx").items() if 97 in tensor.dims]
    assert large == ["model.embed_tokens.weight"]


def test_large_initializers_start_on_a_page(sparse_llama, tmp_path):
    export(sparse_llama, tmp_path / "onnx")
    external = [{e.key: e.value for e in tensor.external_data} for tensor in initializers(tmp_path / "onnx").values()]
    large = [int(entry["offset"]) for entry in external if int(entry.get("length", 0)) > 4096]
    assert large
    assert all(offset % 4096 == 0 for offset in large)


def test_the_manifest_tells_what_the_engine_needs(sparse_llama, tmp_path):
    source = shutil.copytree(sparse_llama, tmp_path / "model")
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 6], "bos_token_id": 1}')
    export(source, tmp_path / "onnx")
    manifest = manifest_of(tmp_path / "onnx")
    sizes = {t.name: np.prod(t.dims) * (4 if t.data_type != onnx.TensorProto.INT64 else 8)
             for t in initializers(tmp_path / "onnx").values()}  # fmt: skip
    assert manifest == {
        "version": 3,
        "graph": GRAPH,
        "pattern": "2:4",
        "value_dtype": "float32",
        "sparse_layers": 10,
        "weight_bytes": sum(sizes.values()),
        "sparse_weight_bytes": sum(size for name, size in sizes.items() if name.endswith((".values", ".indices"))),
        "num_layers": 2,
        "kv_num_heads": 2,
        "head_dim": 8,
        "cache_dtype": "float32",
        "context_length": 64,
        "vocab_size": 97,
        "eos_token_ids": [5, 6],
        "bos_token_id": 1,
        "source_fingerprint": source_fingerprint(source),
        "inputs": [value.name for value in onnx.load(tmp_path / "onnx" / "model.onnx").graph.input],
    }
    assert set(manifest["inputs"]) == {
        "input_ids",
        "block_table",
        "past_lens",
        "cu_seqlens",
        "logits_rows",
        *(f"{which}_cache.{layer}" for which in ("key", "value") for layer in (0, 1)),
    }


def test_the_fingerprint_follows_the_source(sparse_llama, tmp_path):
    source = shutil.copytree(sparse_llama, tmp_path / "model")
    before = source_fingerprint(source)
    assert source_fingerprint(source) == before
    (source / "chat_template.jinja").write_text("{{ x }}")
    with_template = source_fingerprint(source)
    assert with_template != before
    (source / "model.safetensors").touch()
    assert source_fingerprint(source) != with_template


@pytest.mark.parametrize("length", [2**63, 2**40])
def test_a_damaged_shard_is_left_to_the_export_to_refuse(sparse_llama, length, tmp_path):
    source = shutil.copytree(sparse_llama, tmp_path / "model")
    (source / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{")
    source_fingerprint(source)
    with pytest.raises(InputError, match="truncated or damaged"):
        export(source, tmp_path / "onnx")


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_damaged_companion_is_refused(sparse_llama, name, tmp_path):
    source = shutil.copytree(sparse_llama, tmp_path / "model")
    (source / name).write_text("{")
    with pytest.raises(InputError, match=f"{name} is not valid JSON"):
        export(source, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_companions_are_brought_into_the_engines_form(sparse_llama, tmp_path):
    source = shutil.copytree(sparse_llama, tmp_path / "model")
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "a", "b", "ab"])}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "chat_template": "{{ x }}"}')
    export(source, tmp_path / "onnx")
    assert Tokenizer.from_file(str(tmp_path / "onnx" / "tokenizer.json")).encode("ab").ids == [3]
    assert (tmp_path / "onnx" / "chat_template.jinja").read_text() == "{{ x }}"
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (OPTConfig(**CONFIGS["opt"].to_diff_dict() | {"do_layer_norm_before": False}), "OPT variant"),
        (OPTConfig(**CONFIGS["opt"].to_diff_dict() | {"word_embed_proj_dim": 16}), "OPT variant"),
        (GPT2Config(**CONFIGS["gpt2"].to_diff_dict() | {"scale_attn_by_inverse_layer_idx": True}), "GPT-2 variant"),
        (
            LlamaConfig(
                **CONFIGS["llama"].to_diff_dict()
                | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
            ),
            "rope type 'dynamic'",
        ),
    ],
    ids=["opt-post-norm", "opt-projection", "gpt2-scale", "rope-dynamic"],
)
def test_what_the_graph_cannot_express_is_refused(config, match, tmp_path):
    save(make_model(config, sparse=False), tmp_path / "model")
    with pytest.raises(InputError, match=match):
        export(tmp_path / "model", tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("dtype", "match"), [("bfloat16", "not 2:4"), ("float16", "float16")])
def test_value_dtypes_that_do_not_apply_are_refused(dtype, match, tmp_path):
    save(make_model(CONFIGS["llama"], sparse=False), tmp_path / "model")
    with pytest.raises(InputError, match=match):
        export(tmp_path / "model", tmp_path / "onnx", dtype)


def test_an_existing_output_is_kept_unless_told_otherwise(sparse_llama, tmp_path):
    (tmp_path / "onnx").mkdir()
    with pytest.raises(InputError, match="already exists"):
        export(sparse_llama, tmp_path / "onnx")
    export(sparse_llama, tmp_path / "onnx", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
