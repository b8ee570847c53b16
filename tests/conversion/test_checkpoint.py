"""The packed checkpoint on disk: what is written, what is read back, and what is refused."""

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import conversion
from conversion import load_packed, pack24, save_packed, unpack24, verify
from conversion.dense_model import dense_model
from conversion.errors import InputError
from conversion.packed_checkpoint import open_checkpoint
from conversion.shards import INDEX, Shards
from tests.conversion.models import CONFIGS, make_model

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A 2:4 model in several shards, with companions."""
    directory = tmp_path_factory.mktemp("source") / "model"
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    (directory / "tokenizer_config.json").write_text('{"a": 1}')
    (directory / "chat_template.jinja").write_text("hello")
    (directory / "README.md").write_text("not copied")
    return directory


@pytest.fixture
def copy(source, tmp_path):
    """A source to damage."""
    return shutil.copytree(source, tmp_path / "copy")


@pytest.fixture(scope="module")
def packed(source):
    directory = source.parent / "packed"
    save_packed(source, directory)
    return directory


@pytest.fixture
def packed_copy(packed, tmp_path):
    """A packed checkpoint to damage."""
    return shutil.copytree(packed, tmp_path / "packed")


def shard_of(directory, name):
    return directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit(directory, name, change):
    """Replace tensor `name` by change(tensor); remove it if that is None. The index is left as it was."""
    path = shard_of(directory, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | changes
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_packs_and_verifies(name, tmp_path):
    model = make_model(CONFIGS[name], sparse=True)
    model.save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed")
    report = verify(tmp_path / "packed", tmp_path / "model")
    assert report.sparse_layers == (12 if name == "opt" else 8 if name == "gpt2" else 14)
    assert report.logits_tokens > 0
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        ours = dense_model(load_packed(tmp_path / "packed"))(tokens).logits
        # Not bit for bit: where weights lie in memory decides how the matrix library sums. `verify` sees to that.
        torch.testing.assert_close(ours, model(tokens).logits, rtol=1e-5, atol=1e-6)


def test_the_format_is_as_documented(source, packed):
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "cast24",
        "version": 1,
        "pattern": "2:4",
        "value_dtype": "float32",
        "group_size": None,
        "embedding": None,
        "ignore": ["lm_head"],
    }
    tensors = {}
    for shard in packed.glob("*.safetensors"):
        tensors |= load_file(shard)
    original = open_checkpoint(source)
    values, bitmask = pack24(original.tensor(f"{LAYER}.weight"))
    assert torch.equal(tensors[f"{LAYER}.weight_values"], values)
    assert torch.equal(tensors[f"{LAYER}.weight_bitmask"], bitmask)
    assert f"{LAYER}.weight" not in tensors
    assert torch.equal(tensors["model.norm.weight"], original.tensor("model.norm.weight"))
    assert sorted(path.name for path in packed.iterdir() if path.suffix != ".safetensors") == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer_config.json",
    ]


def test_gpt2_packs_along_its_input_axis(tmp_path):
    model = make_model(CONFIGS["gpt2"], sparse=True)
    model.save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed")
    values, bitmask = load_packed(tmp_path / "packed").packed("transformer.h.0.mlp.c_fc")
    assert values.shape == (56, 16)
    assert torch.equal(unpack24(values, bitmask), model.transformer.h[0].mlp.c_fc.weight.T)


def test_a_linear_whose_input_is_no_multiple_of_8_stays_dense(tmp_path):
    config = LlamaConfig(**CONFIGS["llama"].to_diff_dict() | {"intermediate_size": 44})
    make_model(config, sparse=True).save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed")
    ignored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert verify(tmp_path / "packed", tmp_path / "model").sparse_layers == 12


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_can_be_rounded(source, tmp_path, dtype):
    save_packed(source, tmp_path / "packed", dtype)
    packed = load_packed(tmp_path / "packed")
    original = open_checkpoint(source).tensor(f"{LAYER}.weight")
    assert packed.packed(LAYER)[0].dtype == getattr(torch, dtype)
    assert torch.equal(packed.tensor(f"{LAYER}.weight"), original.to(getattr(torch, dtype)))
    assert packed.tensor("model.norm.weight").dtype == torch.float32
    assert verify(tmp_path / "packed", source).logits_tokens > 0


def test_a_value_that_overflows_is_refused(copy, tmp_path):
    edit(copy, f"{LAYER}.weight", lambda weight: weight * 1e6)
    with pytest.raises(InputError, match="do not fit"):
        save_packed(copy, tmp_path / "out", "float16")


def test_no_more_than_one_tensor_is_held_while_packing(source, tmp_path, monkeypatch):
    alive, most = [], 0
    read = Shards.tensor

    def watched(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(Shards, "tensor", watched)
    save_packed(source, tmp_path / "packed")
    assert len(alive) > 15
    assert most <= 2  # the new one, and at most the last


# --- refusals: one sentence, and nothing left behind ------------------------------------------------------------------


def assert_refused(source, match, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=match) as error:
        save_packed(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_is_not_24_is_refused(copy, tmp_path):
    def densify(weight):
        weight[5, 12:15] = 1.0
        return weight

    edit(copy, f"{LAYER}.weight", densify)
    assert_refused(copy, rf"'{LAYER}.weight', row 5, group 3", tmp_path)


def test_a_missing_directory_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere", "is not a directory", tmp_path)


def test_a_directory_without_config_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "config.json", tmp_path)


def test_a_truncated_shard_is_refused(copy, tmp_path):
    path = shard_of(copy, f"{LAYER}.weight")
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(copy, "truncated or damaged", tmp_path)


def test_a_missing_shard_is_refused(copy, tmp_path):
    shard_of(copy, f"{LAYER}.weight").unlink()
    assert_refused(copy, "is missing", tmp_path)


def test_an_unknown_architecture_is_refused(copy, tmp_path):
    (copy / "config.json").write_text('{"model_type": "mamba"}')
    assert_refused(copy, "model type 'mamba' is not supported", tmp_path)


def test_a_tensor_that_the_index_names_but_no_shard_holds_is_refused(copy, tmp_path):
    edit(copy, f"{LAYER}.weight", lambda weight: None)
    assert_refused(copy, f"'{LAYER}.weight' is missing", tmp_path)


@pytest.mark.parametrize("name", [f"{LAYER}.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_tensor_missing_without_an_index_is_refused(name, tmp_path):
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != name}, path, metadata={"format": "pt"})
    assert_refused(tmp_path / "model", "is missing", tmp_path)


def test_a_wrong_shape_is_refused(copy, tmp_path):
    edit(copy, f"{LAYER}.weight", lambda weight: weight[:-1].contiguous())
    assert_refused(copy, f"'{LAYER}.weight' has shape", tmp_path)


def test_pickles_are_never_opened(copy, tmp_path):
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, copy / "pytorch_model.bin")
    assert_refused(copy, "pickles", tmp_path)


@pytest.mark.parametrize("shard", ["{source}/model.safetensors", "../model.safetensors", "sub/a.safetensors", ".", 5])
def test_an_index_that_leads_out_of_the_directory_is_refused(copy, shard, tmp_path):
    shard = shard.format(source=copy) if isinstance(shard, str) else shard
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    tensors = [name for path in copy.glob("*.safetensors") for name in load_file(path)]
    (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    assert_refused(copy, "no safetensors file of that directory", tmp_path)
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.name in before and path.name != INDEX} == {
        name: data for name, data in before.items() if name != INDEX
    }


@pytest.mark.parametrize("index", [[], {}, {"weight_map": {}, "metadata": []}, {"weight_map": []}])
def test_what_is_no_index_is_refused(copy, index, tmp_path):
    (copy / INDEX).write_text(json.dumps(index))
    assert_refused(copy, "is not a shard index", tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": ["llama"]}, "names no model_type"),
        ({"quantization_config": "gptq"}, "its quantization_config is no object"),
        ({"compression_config": 1}, "its compression_config is no object"),
    ],
)
def test_a_damaged_config_is_refused(copy, changes, match, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    assert_refused(copy, match, tmp_path)


def test_a_config_may_say_that_nothing_is_quantized(copy, source, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    save_packed(copy, tmp_path / "out")
    verify(tmp_path / "out", source)


def test_a_packed_source_is_refused(packed, tmp_path):
    assert_refused(packed, "already quantized or packed", tmp_path)


def test_an_existing_output_is_kept_unless_told_otherwise(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(InputError, match="already exists"):
        save_packed(source, tmp_path / "out")
    with pytest.raises(InputError, match="holds other files"):
        save_packed(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_output_is_replaced_when_told(source, packed_copy):
    (packed_copy / "config.json").write_text("of before")
    save_packed(source, packed_copy, overwrite=True)
    verify(packed_copy, source)
    assert not list(packed_copy.parent.glob(".*"))


def test_the_source_is_never_overwritten(copy, tmp_path):
    for out in (copy, tmp_path):
        with pytest.raises(InputError, match="would replace its source"):
            save_packed(copy, out, overwrite=True)
    assert len(open_checkpoint(copy).scope) == 14


def test_a_failed_overwrite_keeps_the_old_output(copy, tmp_path):
    edit(copy, f"{LAYER}.weight", torch.ones_like)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / INDEX).write_text("precious")
    with pytest.raises(InputError, match="is not 2:4"):
        save_packed(copy, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / INDEX).read_text() == "precious"


# --- damaged packed checkpoints ---------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_bitmask_is_found(packed_copy):
    def flip(bitmask):
        bitmask[7, 1] ^= 0b100
        return bitmask

    edit(packed_copy, f"{LAYER}.weight_bitmask", flip)
    with pytest.raises(InputError, match=rf"'{LAYER}.weight_bitmask'.*row 7, group 2 of the bitmask"):
        load_packed(packed_copy).tensor(f"{LAYER}.weight")
    with pytest.raises(InputError, match="row 7, group 2"):
        verify(packed_copy)


@pytest.mark.parametrize("tensor", [f"{LAYER}.weight_bitmask", f"{LAYER}.weight_values", "model.norm.weight"])
def test_damage_that_leaves_the_format_valid_is_found_by_its_checksum(packed_copy, tensor):
    edit(packed_copy, tensor, lambda old: old.flip(0).contiguous())
    with pytest.raises(InputError, match=f"'{tensor}'.*SHA-256"):
        verify(packed_copy)


def test_damage_is_found_by_comparison_where_there_is_no_checksum(source, packed_copy):
    edit(packed_copy, f"{LAYER}.weight_bitmask", lambda bitmask: bitmask.flip(0).contiguous())
    path = packed_copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["metadata"]["sha256"]
    path.write_text(json.dumps(index))
    verify(packed_copy)
    with pytest.raises(InputError, match=f"'{LAYER}.weight'.*differs"):
        verify(packed_copy, source)


def test_another_source_is_noticed(packed, tmp_path):
    make_model(CONFIGS["llama"], sparse=True, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="differs"):
        verify(packed, tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": 2}, "version 2"),
        ({"value_dtype": "int8"}, "int8"),
        ({"pattern": "1:4"}, "1:4"),
        ({"value_dtype": "bfloat16"}, "holds torch.float32 values"),
        ({"quant_method": "gptq"}, "not a packed checkpoint"),
    ],
)
def test_another_format_is_refused(packed_copy, changes, match):
    edit_config(packed_copy, **changes)
    with pytest.raises(InputError, match=match):
        load_packed(packed_copy)


def test_a_missing_bitmask_is_refused(packed_copy):
    edit(packed_copy, f"{LAYER}.weight_bitmask", lambda bitmask: None)
    with pytest.raises(InputError, match=f"'{LAYER}.weight_bitmask' is missing"):
        load_packed(packed_copy)


def test_values_and_bitmask_of_different_shapes_are_refused(packed_copy):
    edit(packed_copy, f"{LAYER}.weight_bitmask", lambda bitmask: bitmask[:, :-1].contiguous())
    with pytest.raises(InputError, match=f"layer '{LAYER}' has values of shape"):
        load_packed(packed_copy)


def test_a_truncated_packed_shard_is_refused(packed_copy):
    path = shard_of(packed_copy, f"{LAYER}.weight_values")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated or damaged"):
        load_packed(packed_copy)


def test_an_unpacked_directory_is_refused(source):
    with pytest.raises(InputError, match="not a packed checkpoint"):
        load_packed(source)


def test_opening_reads_no_tensor(packed, monkeypatch):
    monkeypatch.setattr(Shards, "tensor", lambda self, name: pytest.fail(f"read {name}"))
    reader = load_packed(packed)
    assert len(reader.sparse_layers) == 14
    assert reader.linear_shape(f"{LAYER}.weight") == (56, 32)


def test_a_config_that_does_not_fit_the_tensors_is_refused(packed_copy):
    config = json.loads((packed_copy / "config.json").read_text())
    (packed_copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(InputError):
        dense_model(load_packed(packed_copy))


def test_the_package_offers_its_names():
    assert {name for name in conversion.__all__ if callable(getattr(conversion, name))} == set(conversion.__all__)
