"""Quantized kept values: rounding against float64 references, the format byte by byte, what is refused."""

import json
import shutil

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from conversion import load_packed, pack24, save_packed, verify
from conversion.block_walk import input_grams
from conversion.cli import convert
from conversion.dense_model import dense_model
from conversion.drift import DriftingInputs
from conversion.errors import InputError
from conversion.hessian import damped, fit_kept
from conversion.inspection import inspect_directory
from conversion.packed_checkpoint import open_checkpoint
from conversion.quantization.calibrated import calibration_sequences
from conversion.quantization.descent import refine
from conversion.quantization.formats import FP8, INT4, INT8, Quantization, decode, dequantize, encode
from conversion.quantization.gptq import gptq
from conversion.quantization.quantize import quantize_dense, quantize_model, quantize_weight
from conversion.quantization.scales import fit_scales
from tests.cast_train.tiny import tokenizer, write_text
from tests.conversion.models import CONFIGS, make_model

LAYER = "model.layers.1.mlp.up_proj"
FORMATS = [Quantization(INT8, None), Quantization(INT8, 32), Quantization(INT4, 32), Quantization(FP8, None)]


def two_of_four(rows, columns, seed=0):
    """A float64 weight with a heavy tail, and its mask."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns, dtype=torch.float64) ** 3
    groups = weight.view(rows, -1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, torch.rand_like(groups).topk(2, dim=-1).indices, True)
    return (groups * mask).view(rows, columns), mask.view(rows, columns)


def correlated_gram(features, samples=400):
    torch.manual_seed(1)
    mixing = torch.randn(features, features, dtype=torch.float64)
    inputs = torch.randn(samples, features, dtype=torch.float64) @ mixing
    return inputs.T @ inputs


def output_error(weight, rounded, gram):
    difference = weight - rounded
    return ((difference @ gram) * difference).sum().item()


def test_every_four_bit_code_survives_its_byte():
    codes = torch.arange(-8.0, 8).repeat(3).reshape(2, 24)
    stored = encode(codes, INT4)
    assert stored.shape == (2, 12)
    assert stored.dtype == torch.uint8
    assert torch.equal(decode(stored, INT4), codes)
    low, high = 1.0, -3.0
    assert encode(torch.tensor([[low, high]]), INT4).item() == 1 | (13 << 4)


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda q: f"{q.values.name}-{q.group_size}")
def test_dequantizing_is_code_times_scale_of_its_group(quantization):
    weight, mask = two_of_four(5, 72)  # a last group of 8 columns
    codes, scale = quantize_weight(weight.float(), mask, quantization)
    assert scale.shape == (5, 1 if quantization.group_size is None else 3)
    bitmask = pack24(weight)[1]
    stored = encode(codes[mask].view(5, 36), quantization.values)
    assert stored.shape == quantization.stored_shape(5, 36)
    size = quantization.group_size or 72
    restored = dequantize(stored, bitmask, scale, quantization)
    assert restored.dtype == torch.float32
    for row in range(5):
        for column in range(72):
            expected = codes[row, column].item() * scale[row, column // size].item() if mask[row, column] else 0.0
            assert restored[row, column].item() == pytest.approx(expected, rel=1e-6)


def test_minus_zero_is_stored_as_zero():
    assert encode(torch.tensor([[-0.0, 1.0]]), FP8).view(torch.uint8)[0, 0] == 0


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda q: f"{q.values.name}-{q.group_size}")
def test_rounding_to_nearest_is_within_the_format(quantization):
    """No worse than the textbook scale, largest magnitude / highest code; codes within range; masked stay zero."""
    weight, mask = two_of_four(8, 96)
    codes, scale = quantize_weight(weight, mask, quantization)
    values = quantization.values
    assert codes.min() >= values.lowest
    assert codes.max() <= values.highest
    assert (codes[~mask] == 0).all()
    assert (scale != 0).all()
    grouped = quantization.by_group(weight)
    plain = grouped.abs().amax(-1, keepdim=True) / values.highest
    textbook = ((grouped - values.round(grouped / plain) * plain) ** 2).sum()
    assert ((weight - codes * quantization.spread(scale, 96)) ** 2).sum() <= textbook * (1 + 1e-9)


def test_a_group_too_small_for_a_scale_gets_scale_one():
    weight = torch.full((1, 64), 4.9e-44)
    assert fit_scales(weight, Quantization(INT8, None)).item() == 1


def test_a_group_of_zeros_gets_scale_one():
    weight = torch.zeros(2, 64)
    weight[0, :32] = 1.0
    scale = fit_scales(weight, Quantization(INT4, 32))
    assert torch.equal(scale[:, 1], torch.ones(2))
    assert scale[1, 0] == 1


def reference_gptq(weight, mask, hessian, scale, values):
    """Optimal brain surgeon by its formula: invert the Hessian of the columns still free at every single step."""
    weight = weight.clone()
    codes = torch.zeros_like(weight)
    free = hessian.diagonal().argsort(descending=True).tolist()
    while free:
        column = free[0]
        codes[:, column] = values.round(weight[:, column] / scale[:, column]) * mask[:, column]
        error = weight[:, column] - codes[:, column] * scale[:, column]
        inverse = torch.linalg.inv(hessian[free][:, free])
        weight[:, free] -= torch.outer(error / inverse[0, 0], inverse[0])
        free = free[1:]
    return codes


@pytest.mark.parametrize("values", [INT4, INT8, FP8], ids=lambda values: values.name)
def test_gptq_is_optimal_brain_surgeon(values):
    weight, mask = two_of_four(6, 136)  # more than one block of columns, and not a multiple of it
    hessian = damped(correlated_gram(136))
    quantization = Quantization(values, 32)
    scale = quantization.spread(fit_scales(weight, quantization), 136)
    torch.testing.assert_close(
        gptq(weight, mask, hessian, scale, values), reference_gptq(weight, mask, hessian, scale, values)
    )


def test_a_sweep_of_descent_takes_the_best_code_of_each_entry_in_turn():
    weight, mask = two_of_four(3, 136)
    gram = damped(correlated_gram(136))
    scale = Quantization(INT4, 32).spread(fit_scales(weight, Quantization(INT4, 32)), 136)
    start = INT4.round(weight / scale)
    expected = start.clone()
    for _ in range(2):
        for row, column in mask.nonzero().tolist():
            trials = []
            for code in range(-8, 8):
                expected[row, column] = code
                trials.append(output_error(weight[row : row + 1], (expected * scale)[row : row + 1], gram))
            expected[row, column] = torch.tensor(trials).argmin() - 8
    assert torch.equal(refine(start, weight, mask, gram, scale, INT4), expected)


@pytest.mark.parametrize("dense", [False, True])
def test_error_feedback_lowers_the_output_error_and_keeps_the_mask(dense):
    weight, mask = two_of_four(16, 96)
    if dense:
        weight, mask = torch.randn_like(weight), torch.ones_like(mask)
    gram = correlated_gram(96)
    quantization = Quantization(INT4, 32)
    errors = []
    for given in (None, gram):
        codes, scale = quantize_weight(weight, mask, quantization, given)
        assert (codes[~mask] == 0).all()
        errors.append(output_error(weight, codes * quantization.spread(scale, 96), gram))
    assert errors[1] < 0.8 * errors[0]


def test_blocks_of_either_kind_of_attention_are_walked_with_their_own_mask():
    kinds = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 3}
    config = Qwen2Config(**CONFIGS["qwen2"].to_diff_dict() | kinds | {"layer_types": None})
    assert len(set(config.layer_types)) == 2
    model = make_model(config, sparse=False)
    linears = [m for block in model.model.layers for m in block.modules() if isinstance(m, torch.nn.Linear)]
    expected = {}

    def note(module, args):
        x = args[0].reshape(-1, args[0].shape[-1])
        expected[module] = x.T @ x

    handles = [linear.register_forward_pre_hook(note) for linear in linears]
    ids = torch.randint(config.vocab_size, (2, 32))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    found = {}
    for of_block in input_grams(model, linears, ids, "blocks"):
        found |= of_block
    assert set(found) == set(linears)
    for linear in linears:
        torch.testing.assert_close(found[linear], expected[linear], rtol=1e-4, atol=1e-3)


def test_inputs_that_never_fire_count_for_next_to_nothing():
    gram = torch.diag(torch.tensor([0.02, 0.04, 0.0, 0.0]))
    torch.testing.assert_close(damped(gram).diagonal(), torch.tensor([0.0203, 0.0403, 3e-4, 3e-4]))
    torch.testing.assert_close(damped(torch.zeros(3, 3)), torch.eye(3))


def test_inputs_that_never_fire_do_no_harm():
    weight, mask = two_of_four(4, 32)
    gram = correlated_gram(32)
    gram[5] = gram[:, 5] = 0
    codes, scale = quantize_weight(weight, mask, Quantization(INT4, 32), gram)
    assert codes.isfinite().all()
    assert scale.isfinite().all()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A 2:4 model in several shards, with a tokenizer, and calibration text beside it."""
    root = tmp_path_factory.mktemp("source")
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(root / "model", max_shard_size="20KB")
    tokenizer().save_pretrained(root / "model")
    write_text(root / "text.txt")
    return root / "model"


@pytest.fixture(scope="module")
def packed(source):
    save_packed(source, source.parent / "packed", quantization=Quantization(INT4, 32))
    return source.parent / "packed"


@pytest.fixture
def packed_copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "packed")


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda q: f"{q.values.name}-{q.group_size}")
def test_the_format_is_as_documented(source, tmp_path, quantization):
    save_packed(source, tmp_path / "packed", quantization=quantization)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (config["value_dtype"], config["group_size"]) == (quantization.values.name, quantization.group_size)
    tensors = {}
    for shard in (tmp_path / "packed").glob("*.safetensors"):
        tensors |= load_file(shard)
    values, scale = tensors[f"{LAYER}.weight_values"], tensors[f"{LAYER}.weight_scale"]
    assert values.dtype == quantization.values.dtype
    assert values.shape == ((56, 8) if quantization.values is INT4 else (56, 16))
    assert scale.dtype == torch.float32
    assert scale.shape == (56, 1)  # K is 32
    original = open_checkpoint(source).tensor(f"{LAYER}.weight")
    assert torch.equal(tensors[f"{LAYER}.weight_bitmask"], pack24(original)[1])
    report = verify(tmp_path / "packed", source)
    assert report.rounding_error < (0.15 if quantization.values is INT4 else 0.04)
    assert "keep its zeros" in str(report)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_quantizes_on_calibration_text(name, tmp_path):
    model = make_model(CONFIGS[name], sparse=True)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    int8 = Quantization(INT8, None)
    save_packed(tmp_path / "model", tmp_path / "packed", quantization=int8, calibration=[tmp_path / "text.txt"])
    assert verify(tmp_path / "packed", tmp_path / "model").rounding_error < 0.05
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    packed = load_packed(tmp_path / "packed")
    assert packed.dtype == torch.float32
    with torch.no_grad():
        difference = dense_model(packed)(tokens).logits - model(tokens).logits
    assert 0 < difference.abs().max() < 0.1 * model(tokens).logits.abs().max()


def test_calibration_lowers_the_error_of_the_whole_model(source, tmp_path):
    quantization, text = Quantization(INT4, 32), source.parent / "text.txt"
    save_packed(source, tmp_path / "nearest", quantization=quantization)
    save_packed(source, tmp_path / "calibrated", quantization=quantization, calibration=[text])
    tokens = calibration_sequences([text], tokenizer(), 64, 1024)
    with torch.no_grad():
        logits = dense_model(open_checkpoint(source))(tokens).logits
        errors = [
            (dense_model(load_packed(tmp_path / name))(tokens).logits - logits).square().mean()
            for name in ("nearest", "calibrated")
        ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("sparse", [True, False], ids=["2:4", "dense"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_four_bits_make_up_for_what_was_rounded_before(name, sparse, monkeypatch):
    """Less error at the end of the blocks than when each linear sees to its own rounding alone; zeros stay."""
    tokens = torch.randint(0, 97, (32, 32), generator=torch.Generator().manual_seed(0))
    dense = make_model(CONFIGS[name], sparse=sparse).eval()

    def error():
        model = make_model(CONFIGS[name], sparse=sparse).eval()
        linears = {m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and n != "lm_head"}
        zeros = {linear: linear.weight == 0 for linear in linears}
        found = quantize_model(model, linears, Quantization(INT4, 32), tokens, sparse=sparse)
        assert {linear for linear, _, _ in found} == linears
        assert all((linear.weight[zeros[linear]] == 0).all() for linear in linears)
        with torch.no_grad():
            return (dense.base_model(tokens)[0] - model.base_model(tokens)[0]).square().mean()

    made_up_for = error()
    monkeypatch.setattr(DriftingInputs, "corrected", lambda _, weight: weight)
    assert made_up_for < 0.8 * error()


@pytest.mark.parametrize("rows", [1, 7])
def test_kept_weights_are_fitted_to_the_outputs(rows):
    sparse, mask = two_of_four(rows, 24)
    target, hessian = torch.randn(rows, 24, dtype=torch.float64), damped(correlated_gram(24))
    fitted = fit_kept(sparse, target, hessian)
    assert (fitted[~mask] == 0).all()
    for row, kept in enumerate(mask):
        expected = torch.linalg.solve(hessian[kept][:, kept], (hessian @ target[row])[kept])
        torch.testing.assert_close(fitted[row, kept], expected)


def test_bfloat16_models_quantize(tmp_path):
    make_model(CONFIGS["llama"], sparse=True).bfloat16().save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed", quantization=Quantization(FP8, None))
    assert verify(tmp_path / "packed", tmp_path / "model").rounding_error < 0.04


@pytest.mark.parametrize("embedding", [Quantization(INT8, None), Quantization(INT4, 64)], ids=lambda q: q.values.name)
@pytest.mark.parametrize("name", ["llama", "llama-untied-rope3", "gpt2", "opt"])
def test_embedding_and_lm_head_are_stored_quantized(name, embedding, tmp_path):
    make_model(CONFIGS[name], sparse=True).save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed", "bfloat16", embedding=embedding)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (config["value_dtype"], config["group_size"]) == ("bfloat16", None)
    assert config["embedding"] == {"value_dtype": embedding.values.name, "group_size": embedding.group_size}
    tensors, source = load_file(tmp_path / "packed" / "model.safetensors"), open_checkpoint(tmp_path / "model")
    assert len(source.embedding_tensors) == 1 + (name == "llama-untied-rope3")
    checkpoint = load_packed(tmp_path / "packed")
    for tensor_name in source.embedding_tensors:
        assert tensor_name not in tensors
        values, scale = tensors[f"{tensor_name}_values"], tensors[f"{tensor_name}_scale"]
        codes = values.float()
        if embedding.values is INT4:  # the earlier value in the low half of a byte, two's complement
            halves = torch.stack((values & 15, values >> 4), -1).flatten(1).int()
            codes = (halves - 16 * (halves > 7)).float()
        assert (values.shape, scale.shape) == ((97, 32 * embedding.values.bits // 8), (97, 1))
        weight = source.tensor(tensor_name)
        assert torch.equal(checkpoint.tensor(tensor_name), codes * scale)
        # nearest: by half a step at most, or clipped at the ends of the range
        clipped = (codes <= embedding.values.lowest) | (codes >= embedding.values.highest)
        assert (((codes * scale - weight).abs() <= 0.5001 * scale.abs()) | clipped).all()
    report = verify(tmp_path / "packed", tmp_path / "model")
    assert 0 < report.rounding_error < (0.15 if embedding.values is INT4 else 0.02)
    found = inspect_directory(tmp_path / "packed")
    assert (found.value_dtype, found.embedding_dtype) == ("bfloat16", embedding.values.name)
    assert (
        found.stored_bytes == found.linear_packed_bytes + found.other_bytes == sum(t.nbytes for t in tensors.values())
    )


def test_pieces_of_a_large_weight_are_rounded_as_the_whole(monkeypatch):
    weight = torch.randn(70, 64).bfloat16()
    whole = quantize_dense(weight, Quantization(INT4, 32))
    monkeypatch.setattr("conversion.quantization.quantize.ROWS_AT_ONCE", 16)
    assert all(map(torch.equal, quantize_dense(weight, Quantization(INT4, 32)), whole))


@pytest.mark.parametrize(
    ("field", "match"),
    [
        (None, "do not agree on whether the embedding is quantized"),
        ({"value_dtype": "int8", "group_size": 48}, "embedding: group size 48"),
        ({"value_dtype": "int4", "group_size": 64}, "speaks of a matrix of int4"),
        ({"value_dtype": "float32"}, "reads int8 and int4"),
        ("int8", "embedding: "),
    ],
)
def test_an_embedding_that_the_config_does_not_fit_is_refused(source, tmp_path, field, match):
    save_packed(source, tmp_path / "packed", embedding=Quantization(INT8, None))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"]["embedding"] = field
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=match):
        load_packed(tmp_path / "packed")


def test_a_damaged_embedding_is_refused(source, tmp_path):
    save_packed(source, tmp_path / "packed", embedding=Quantization(INT8, None))
    edit(tmp_path / "packed", "model.embed_tokens.weight_scale", lambda scale: scale * 0)
    with pytest.raises(InputError, match="scale is zero or not finite"):
        verify(tmp_path / "packed")


def test_another_models_embedding_is_told_apart(source, tmp_path):
    save_packed(source, tmp_path / "packed", embedding=Quantization(INT8, None))
    edit(tmp_path / "packed", "model.embed_tokens.weight_values", lambda values: values.flip(0).contiguous())
    with pytest.raises(InputError, match=r"embed_tokens\.weight' .* differs"):
        verify(tmp_path / "packed", source)


def test_info_counts_values_bitmask_and_scales(packed):
    found = inspect_directory(packed)
    in_scope = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 56 * 32)
    scales = 2 * (32 + 32 + 16 + 16 + 56 + 56 + 2 * 32)  # down_proj has 56 columns: two groups of 32
    assert (found.kind, found.value_dtype, found.violations) == ("packed 2:4", "int4", 0)
    assert found.linear_packed_bytes == in_scope * 3 / 8 + 4 * scales
    assert found.linear_dense_bytes == in_scope * 4 / 8 + 4 * scales
    assert found.packed_bits_per_weight == pytest.approx(3 + 32 * scales / in_scope)
    assert found.stored_bytes == found.linear_packed_bytes + found.other_bytes


def edit(directory, name, change):
    """Replace tensor `name`, and forget the checksums as one who means harm would."""
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    path = directory / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})
    del index["metadata"]["sha256"]
    index_path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("scale", lambda scale: scale * float("nan"), "scale is zero or not finite"),
        ("scale", lambda scale: scale * 0, "scale is zero or not finite"),
        ("scale", lambda scale: scale.double(), "torch.float64"),
        ("scale", lambda scale: scale.repeat(1, 2), r"ask for \[56, 1\]"),
        ("scale", lambda scale: None, "weight_scale' is missing"),
        ("values", lambda values: values[:, 1:].contiguous(), r"values of shape \[56, 7\]"),
    ],
)
def test_tampered_tensors_are_refused(packed_copy, part, change, match):
    edit(packed_copy, f"{LAYER}.weight_{part}", change)
    with pytest.raises(InputError, match=match):
        verify(packed_copy)


def test_a_changed_scale_does_not_match_its_checksum(packed_copy):
    sums = json.loads((packed_copy / "model.safetensors.index.json").read_text())
    edit(packed_copy, f"{LAYER}.weight_scale", lambda scale: scale * 1.01)
    (packed_copy / "model.safetensors.index.json").write_text(json.dumps(sums))
    with pytest.raises(InputError, match=r"weight_scale' .* is damaged"):
        verify(packed_copy)


@pytest.mark.parametrize(("quantization", "byte"), [(FORMATS[0], -128), (FORMATS[3], 0x7F)])
def test_values_that_are_no_codes_are_refused(source, tmp_path, quantization, byte):
    save_packed(source, tmp_path / "packed", quantization=quantization)

    def damage(values):
        values.view(torch.int8)[3, 4] = byte
        return values

    edit(tmp_path / "packed", f"{LAYER}.weight_values", damage)
    with pytest.raises(InputError, match="is no code"):
        verify(tmp_path / "packed")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"group_size": 48}, "group size 48"),
        ({"group_size": None}, "per group"),
        ({"value_dtype": "int8"}, "torch.uint8 values"),
        ({"value_dtype": "float32", "group_size": None}, "torch.uint8 values"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(packed_copy, changes, match):
    config = json.loads((packed_copy / "config.json").read_text())
    config["quantization_config"] |= changes
    (packed_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=match):
        load_packed(packed_copy)


def test_scales_of_unquantized_values_are_refused(source, tmp_path):
    save_packed(source, tmp_path / "packed")
    edit(tmp_path / "packed", f"{LAYER}.weight_values", lambda values: values)
    path = next((tmp_path / "packed").glob("model-00001*"))
    save_file(load_file(path) | {f"{LAYER}.weight_scale": torch.ones(56, 1)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="values are not quantized"):
        load_packed(tmp_path / "packed")


def test_the_command_quantizes_verifies_and_says_so(source, tmp_path):
    app = typer.Typer()
    app.command()(convert)
    options = [
        "--quantize",
        "int4",
        "--embedding",
        "int8",
        "--group-size",
        "32",
        "--calibration",
        str(source.parent / "text.txt"),
    ]
    result = CliRunner().invoke(app, [str(source), str(tmp_path / "packed"), *options, "--verify"])
    assert result.exit_code == 0
    assert "keep its zeros" in result.stdout
    assert load_packed(tmp_path / "packed").quantization == Quantization(INT4, 32)
    assert load_packed(tmp_path / "packed").embedding == Quantization(INT8, None)


def test_what_does_not_go_together_is_refused(source, tmp_path):
    int8 = Quantization(INT8, None)
    with pytest.raises(InputError, match="one of the two"):
        save_packed(source, tmp_path / "out", "bfloat16", quantization=int8)
    with pytest.raises(InputError, match="quantized values"):
        save_packed(source, tmp_path / "out", calibration=[source.parent / "text.txt"])
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InputError, match="less than one sequence of 64"):
        save_packed(source, tmp_path / "out", quantization=int8, calibration=[tmp_path / "short.txt"])
    with pytest.raises(InputError, match="embedding cannot be quantized to float8"):
        save_packed(source, tmp_path / "out", embedding=Quantization(FP8, None))
    with pytest.raises(InputError, match="group size 100"):
        Quantization.named("int8", 100)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_sparse_or_has_no_tokenizer_is_refused(source, tmp_path):
    calibration = [source.parent / "text.txt"]
    make_model(CONFIGS["llama"], sparse=False).save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"not 2:4: tensor 'model\.layers\.0"):
        save_packed(
            tmp_path / "dense", tmp_path / "out", quantization=Quantization(INT8, None), calibration=calibration
        )
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(tmp_path / "mute")
    with pytest.raises(InputError, match="no tokenizer"):
        save_packed(tmp_path / "mute", tmp_path / "out", quantization=Quantization(INT8, None), calibration=calibration)


def test_onnx_export_dequantizes_on_demand(packed, tmp_path):
    from conversion.onnx import export

    export(packed, tmp_path / "onnx", "float32")
    manifest = json.loads((tmp_path / "onnx" / "cast_onnx.json").read_text())
    assert (manifest["pattern"], manifest["value_dtype"]) == ("2:4", "float32")


def test_a_linear_whose_input_is_no_multiple_of_8_stays_dense(tmp_path):
    config = LlamaConfig(**CONFIGS["llama"].to_diff_dict() | {"intermediate_size": 44})
    make_model(config, sparse=True).save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed", quantization=Quantization(INT4, 64))
    assert verify(tmp_path / "packed", tmp_path / "model").sparse_layers == 12
