"""`cast_serve.load`: a packed checkpoint for `model.generate(...)` and pipelines."""

import warnings
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from cast_serve.torch_model.gpu_linear import QUANTIZED, SPARSE
from cast_serve.torch_model.modules import PackedLinear, QuantizedEmbedding, QuantizedLinear, SparseLinear
from cast_serve.torch_model.quantizer import PackedConfig
from cast_serve.torch_model.widening import has_kernel, widened
from conversion.checkpoint import widest
from conversion.dense_model import dense_config, model_of
from conversion.errors import InputError
from conversion.families import LM_HEAD, place_in_blocks
from conversion.hub import local_model
from conversion.model_config import read_config
from conversion.packed_checkpoint import PackedCheckpoint, is_packed
from conversion.quantization.formats import Quantization

_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
"""Of activations; the first is the default."""


def load(
    model_dir: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    float_activations: bool = False,
) -> PreTrainedModel:
    """Return the causal language model of a packed checkpoint for inference, on the CPU or an NVIDIA GPU.

    Sparse linears, and a quantized embedding, hold their weight once, in the kernels' layout (on the CPU float16 values
    as float32, on a GPU float32 values as bfloat16); a dense copy is never made. Quantized values that the device has
    no kernel for become floats of `dtype`, with a warning. Everything else is as `from_pretrained` has it. The model
    cannot be trained, saved or moved to another device or dtype.

    Args:
        model_dir: packed checkpoint (`cast convert`), or its hub id.
        device: "cpu", "cuda" or "cuda:1", say. On a GPU the variable CAST24_SPARSE_MEMORY chooses as `cast serve
            --sparse-memory` does.
        dtype: of activations and dense weights, torch.float32 or torch.bfloat16 on the CPU, torch.bfloat16 or
            torch.float16 on a GPU; None takes what the checkpoint has its dense weights in if it is one of these, else
            the first.
        float_activations: multiply quantized weights by activations as they are, instead of rounded to 8 bits.

    Raises:
        InputError: not a packed checkpoint, a damaged one, or no such device.
    """
    device = _device(device)
    directory = local_model(model_dir)
    checkpoint = _open(directory)
    if float_activations and checkpoint.quantization is None and checkpoint.embedding is None:
        raise InputError(f"the weights of {directory} are not quantized: leave float_activations out")
    packed = {*checkpoint.scope, *(f"{layer}.weight" for layer in checkpoint.quantized_embeddings)}
    dense = [name for name in checkpoint.names if name not in packed]
    dtypes = _DTYPES[device.type]
    if dtype is None:
        stored = widest(checkpoint.shards.info(name).dtype for name in dense)
        dtype = stored if stored in dtypes else dtypes[0]
    if dtype not in dtypes:
        known = " or ".join(map(str, dtypes))
        raise InputError(f"the kernels of a {device.type} device take activations in {known}, not {dtype}")
    layers = {place_in_blocks(checkpoint.family, layer): layer for layer in checkpoint.sparse_layers}
    if (quantization := checkpoint.quantization) is not None and not has_kernel(quantization, device.type):
        _warn_of_widening(directory, quantization, device, dtype)
    config = PackedConfig(list(layers), _kind(checkpoint, device), checkpoint.embedding is not None)
    model = model_of(checkpoint, {name: checkpoint.tensor(name) for name in dense}, dtype, config)
    for name, module in model.named_modules():
        if (layer := layers.get(place_in_blocks(checkpoint.family, name))) is not None:
            assert isinstance(module, PackedLinear)
            _pack(module, checkpoint, layer, device, dtype, float_activations)
    if checkpoint.embedding is not None:
        _pack_embedding(model, checkpoint, checkpoint.embedding, device, float_activations)
    torch.nn.Module.to(model, device)  # what is packed is there already
    if (settings := directory / "generation_config.json").is_file():
        model.generation_config = _generation_config(settings)
    model.config.name_or_path = str(model_dir)
    return model.requires_grad_(False)


def _generation_config(path: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path.parent)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be used ({error}): mend or delete it") from None


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"there is no device '{name}': use cpu or cuda") from None
    if device.type not in _DTYPES:
        raise InputError(f"there are no 2:4 kernels for '{name}': use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"torch {torch.__version__} sees no device '{name}' on this machine: use cpu")
    return device


def _warn_of_widening(directory: Path, quantization: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    group = "" if quantization.group_size is None else f" in groups of {quantization.group_size}"
    warnings.warn(
        f"{directory} holds {quantization.values.name} values{group}, for which a {device.type} device has no kernel: "
        f"they become {dtype}, with more memory and less speed",
        stacklevel=3,
    )


def _kind(checkpoint: PackedCheckpoint, device: torch.device) -> type[PackedLinear]:
    quantization = checkpoint.quantization
    if quantization is None or not has_kernel(quantization, device.type):
        return SPARSE[device.type]
    return QUANTIZED[device.type]


def _open(directory: Path) -> PackedCheckpoint:
    if (directory / "cast_onnx.json").is_file():
        raise InputError(f"{directory} is for the ONNX Runtime engine: give the packed checkpoint it was made from")
    if not is_packed(read_config(directory)):
        raise InputError(
            f"{directory} is not packed: pack it with 'cast convert {directory} OUT', after 'cast train' if it is not "
            "2:4 yet, and load OUT"
        )
    return PackedCheckpoint(directory)


def _pack(
    module: PackedLinear,
    checkpoint: PackedCheckpoint,
    layer: str,
    device: torch.device,
    dtype: torch.dtype,
    float_activations: bool,
) -> None:
    _check_shape(checkpoint, layer, checkpoint.linear_shape(layer), (module.out_features, module.in_features))
    values, bitmask = (part.to(device) for part in checkpoint.packed(layer))
    quantization, scale = checkpoint.quantization, checkpoint.scale(layer)
    if isinstance(module, SparseLinear):
        if quantization is not None and scale is not None:
            values = widened(values, scale.to(device), quantization, module.in_features, dtype)
        module.pack(values, bitmask)
    elif isinstance(module, QuantizedLinear):
        assert scale is not None
        assert quantization is not None
        module.pack(values, bitmask, scale.to(device), quantization.group_size, float_activations=float_activations)


def _pack_embedding(
    model: PreTrainedModel,
    checkpoint: PackedCheckpoint,
    quantization: Quantization,
    device: torch.device,
    float_activations: bool,
) -> None:
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(lm_head, QuantizedLinear)
    tied = dense_config(checkpoint).tie_word_embeddings  # model.config says no, lest transformers ties them
    for layer in checkpoint.quantized_embeddings:
        values, scale = (part.to(device) for part in checkpoint.quantized_embedding(layer))
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
