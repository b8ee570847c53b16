"""GGUF files of a Hugging Face Llama, for llama.cpp."""

import ctypes
import logging
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conversion.checkpoint import Checkpoint
from conversion.errors import InputError


def installed() -> bool:
    """Tell whether both packages are there that this and running the files take."""
    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


def save_gguf(source: Path, out: Path, kind: str) -> None:
    """Quantize a Llama as llama.cpp's own tool does, embedding and lm_head included. `out` appears complete.

    The file has no vocabulary, so it is for token ids only.

    Args:
        source: a Hugging Face Llama with plain rotary positions.
        out: the file to write.
        kind: "Q8_0" or "Q4_0".

    Raises:
        InputError: the model is no such Llama.
    """
    import llama_cpp

    from benchmarks.cpu.llama_cpp_log import silence

    checkpoint = Checkpoint(source)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        plain, quantized = Path(scratch) / "plain.gguf", Path(scratch) / out.name
        _write(checkpoint, plain)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        silence()
        code = llama_cpp.llama_model_quantize(str(plain).encode(), str(quantized).encode(), ctypes.byref(params))
        if code:
            raise RuntimeError(f"llama.cpp could not quantize {source} to {kind} (code {code})")
        quantized.rename(out)


def _write(checkpoint: Checkpoint, path: Path) -> None:
    """Write all tensors as they are: float32, or float16 where the source is stored in 16 bits."""
    import gguf

    config = checkpoint.config
    if config["model_type"] != "llama" or _rope(config).get("rope_type", "default") != "default":
        raise InputError(f"{checkpoint.directory} cannot be written as GGUF here: only Llama with plain RoPE can")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, heads if name.endswith("q_proj.weight") else kv_heads)
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name is None:
            raise InputError(f"{checkpoint.directory} holds '{name}', for which GGUF has no name")
        writer.add_tensor(gguf_name, _array(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters, where transformers writes them now or where it used to."""
    return config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head, first half and second half, -> in pairs: llama.cpp rotates neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _array(tensor: Tensor) -> np.ndarray:
    wide = tensor.dim() == 1 or tensor.dtype == torch.float32
    return tensor.to(torch.float32 if wide else torch.float16).contiguous().numpy()
