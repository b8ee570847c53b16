"""`cast_serve.load`: a packed checkpoint for `model.generate(...)` and pipelines."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from cast_serve.torch_model.modules import PackedLinear, QuantizedEmbedding, QuantizedLinear, SparseLinear
from cast_serve.torch_model.quantizer import PackedConfig
from conversion.checkpoint import widest
from conversion.dense_model import dense_config, model_of
from conversion.errors import InputError
from conversion.families import LM_HEAD, place_in_blocks
from conversion.hub import local_model
from conversion.model_config import read_config
from conversion.packed_checkpoint import PackedCheckpoint, is_packed
from conversion.quantization.formats import FP8, Quantization

_DTYPES = (torch.float32, torch.bfloat16)


def load(
    model_dir: str | Path, *, dtype: torch.dtype | None = None, float_activations: bool = False
) -> PreTrainedModel:
    """Return the causal language model of a packed checkpoint, on the CPU, for inference.

    Sparse linears, and a quantized embedding, hold their weight once, in the kernels' layout (float16 values as
    float32); a dense copy is never made. Everything else is as `from_pretrained` has it. The model cannot be trained,
    saved or moved to another device or dtype.

    Args:
        model_dir: packed checkpoint (`cast convert`), or its hub id.
        dtype: of activations and dense weights, torch.float32 or torch.bfloat16; None takes bfloat16 where the
            checkpoint has its dense weights so, else float32.
        float_activations: multiply quantized weights by activations as they are, instead of rounded to 8 bits.

    Raises:
        InputError: not a packed checkpoint, a damaged one, or one of values that the CPU has no kernel for.
    """
    directory = local_model(model_dir)
    checkpoint = _open(directory)
    if float_activations and checkpoint.quantization is None and checkpoint.embedding is None:
        raise InputError(f"the weights of {directory} are not quantized: leave float_activations out")
    packed = {*checkpoint.scope, *(f"{layer}.weight" for layer in checkpoint.quantized_embeddings)}
    dense = [name for name in checkpoint.names if name not in packed]
    if dtype is None:
        stored = widest(checkpoint.shards.info(name).dtype for name in dense)
        dtype = stored if stored in _DTYPES else torch.float32
    if dtype not in _DTYPES:
        raise InputError(f"the kernels take activations in torch.float32 or torch.bfloat16, not {dtype}")
    layers = {place_in_blocks(checkpoint.family, layer): layer for layer in checkpoint.sparse_layers}
    config = PackedConfig(list(layers), checkpoint.quantization is not None, checkpoint.embedding is not None)
    model = model_of(checkpoint, {name: checkpoint.tensor(name) for name in dense}, dtype, config)
    for name, module in model.named_modules():
        if (layer := layers.get(place_in_blocks(checkpoint.family, name))) is not None:
            assert isinstance(module, PackedLinear)
            _pack(module, checkpoint, layer, float_activations)
    if checkpoint.embedding is not None:
        _pack_embedding(model, checkpoint, checkpoint.embedding, float_activations)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.config.name_or_path = str(model_dir)
    return model.requires_grad_(False)


def _open(directory: Path) -> PackedCheckpoint:
    if (directory / "cast_onnx.json").is_file():
        raise InputError(f"{directory} is for the ONNX Runtime engine: give the packed checkpoint it was made from")
    if not is_packed(read_config(directory)):
        raise InputError(
            f"{directory} is not packed: pack it with 'cast convert {directory} OUT', after 'cast train' if it is not "
            "2:4 yet, and load OUT"
        )
    checkpoint = PackedCheckpoint(directory)
    if checkpoint.quantization is not None and checkpoint.quantization.values is FP8:
        raise InputError(
            f"{directory} holds {FP8.name} values, for which the CPU has no kernel: convert its source with "
            "--quantize int8, int4 or not at all"
        )
    return checkpoint


def _pack(module: PackedLinear, checkpoint: PackedCheckpoint, layer: str, float_activations: bool) -> None:
    _check_shape(checkpoint, layer, checkpoint.linear_shape(layer), (module.out_features, module.in_features))
    values, bitmask = checkpoint.packed(layer)
    if isinstance(module, SparseLinear):
        module.pack(values, bitmask)
    elif isinstance(module, QuantizedLinear):
        scale = checkpoint.scale(layer)
        assert scale is not None
        assert checkpoint.quantization is not None
        module.pack(values, bitmask, scale, checkpoint.quantization.group_size, float_activations=float_activations)


def _pack_embedding(
    model: PreTrainedModel, checkpoint: PackedCheckpoint, quantization: Quantization, float_activations: bool
) -> None:
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(lm_head, QuantizedLinear)
    tied = dense_config(checkpoint).tie_word_embeddings  # model.config says no, lest transformers ties them
    for layer in checkpoint.quantized_embeddings:
        values, scale = checkpoint.quantized_embedding(layer)
        expected = embedding.num_embeddings, embedding.embedding_dim
        _check_shape(checkpoint, layer, checkpoint.linear_shape(f"{layer}.weight"), expected)
        if f"{layer}.weight" != LM_HEAD:
            embedding.pack(values, scale, quantization.group_size)
        elif not tied:
            lm_head.pack(values, None, scale, quantization.group_size, float_activations=float_activations)
    if tied:
        model.set_output_embeddings(embedding.tied_linear(float_activations=float_activations))


def _check_shape(checkpoint: PackedCheckpoint, layer: str, shape: tuple[int, int], expected: tuple[int, int]) -> None:
    if shape != expected:
        raise InputError(
            f"layer '{layer}' of {checkpoint.directory} is {list(shape)}, but its config.json asks for "
            f"{list(expected)}: make the checkpoint again"
        )
