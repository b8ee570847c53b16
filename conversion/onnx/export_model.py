"""Export a model directory, packed or dense, to the directory that the ONNX Runtime engine serves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers import PreTrainedModel

from conversion.atomic import new_directory
from conversion.checkpoint import COMPANION_FILES, Checkpoint
from conversion.dense_model import dense_model
from conversion.errors import InputError
from conversion.families import LM_HEAD
from conversion.fingerprint import source_fingerprint
from conversion.model_config import read_json
from conversion.onnx import GRAPH
from conversion.onnx.dense_linear import use_dense_linear
from conversion.onnx.dense_nbits import DenseQuantization, use_dense_nbits
from conversion.onnx.fusion import fuse_steps
from conversion.onnx.linear import weights_of
from conversion.onnx.logits_rows import select_logits_rows
from conversion.onnx.paged_attention import head_dim, use_paged_attention
from conversion.onnx.quantized_embedding import use_quantized_embedding
from conversion.onnx.quantized_matmul import use_quantized_matmul
from conversion.onnx.sparse_matmul import use_sparse_matmul
from conversion.onnx.stock_graph import stock_graph
from conversion.packed import PATTERN
from conversion.packed_checkpoint import PackedCheckpoint, open_checkpoint
from conversion.progress import byte_progress
from conversion.quantization.calibrated import calibrated_codes
from conversion.quantization.formats import Quantization
from conversion.quantization.quantize import quantize_dense
from conversion.tokenizer import load_tokenizer

MODEL = "model.onnx"
MANIFEST = "cast_onnx.json"
MANIFEST_VERSION = 3
PAGE = 4096  # large initializers start on a page, so that ONNX Runtime maps them from the file

_VALUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_QUANTIZED = ("int8", "int4")
_CACHES = {"float32": ir.DataType.FLOAT, "bfloat16": ir.DataType.BFLOAT16}


def export(
    source_dir: str | Path,
    out_dir: str | Path,
    value_dtype: str | None = None,
    *,
    float_activations: bool = False,
    embedding: Quantization | None = None,
    dense: DenseQuantization | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> None:
    """Export a packed or dense-stored Hugging Face model directory.

    A source whose whole scope is 2:4 gets sparse operators; any other keeps the stock builder's dense graph, changed in
    its attention, and where asked quantized. Holds the dense model in memory once, in its own dtype.

    Args:
        source_dir: packed checkpoint, or dense-stored model.
        out_dir: appears complete or not at all.
        value_dtype: "float32" or "bfloat16" for the kept values of a 2:4 model; None keeps bfloat16 as it is and takes
            float32 for the rest. Must be None or "float32" for a dense model. Quantized values stay so, unless it is
            named: then they are dequantized.
        float_activations: leave activations as they are: quantized weights multiply them without rounding to 8 bits,
            and the cache holds keys and values in float32. It does so for float32 weights anyway, and in bfloat16 for
            others.
        embedding: quantize embedding and lm_head so, rounding to nearest; None keeps them as stored. Not for a
            dense model in float32.
        dense: quantize the linears of a dense model so; None keeps them float32.
        overwrite: replace an existing `out_dir`.

    Raises:
        InputError: the source is damaged or of an unsupported architecture, value_dtype does not apply, or `out_dir`
            exists.
    """
    source = open_checkpoint(source_dir)
    sparse = isinstance(source, PackedCheckpoint) or source.first_violation() is None
    if dense is not None and sparse:
        raise InputError(
            f"{source.directory} is 2:4: quantize it as a packed checkpoint (cast convert --quantize), and export that"
        )
    dtype = _value_dtype(source, sparse, value_dtype) if dense is None else dense.weights.values.name
    if embedding is not None and not sparse and dense is None:
        raise InputError(f"{source.directory} is not 2:4, and a dense float32 model keeps its embedding: leave it out")
    if embedding is not None and isinstance(source, PackedCheckpoint) and source.embedding is not None:
        raise InputError(
            f"the embedding of {source.directory} is already {source.embedding.values.name}: leave --embedding out"
        )
    with new_directory(Path(out_dir), overwrite, source.directory, [MANIFEST]) as building:
        model, calibrated = dense_model(source), None
        if dense is not None and dense.calibration:
            assert isinstance(source, Checkpoint)
            model = model.float()
            calibrated = calibrated_codes(model, source, dense.weights, dense.calibration, sparse=False)
        graph = stock_graph(model)
        cache_dtype = "float32" if dtype == "float32" or float_activations else "bfloat16"
        use_paged_attention(graph, model.config, _CACHES[cache_dtype])
        select_logits_rows(graph)
        if dense is not None:
            use_dense_nbits(graph, dense, source.config["model_type"], calibrated)
        elif dtype in _QUANTIZED:
            assert isinstance(source, PackedCheckpoint)
            use_quantized_matmul(graph, source, float_activations=float_activations)
        elif sparse:
            use_sparse_matmul(graph, _VALUE_DTYPES[dtype])
        embeddings = _weight(model.get_input_embeddings()), _weight(model.get_output_embeddings())
        quantized = _quantized_embeddings(source, embeddings, embedding)
        if quantized is not None:
            use_quantized_embedding(graph, *quantized, float_activations=float_activations)
        elif sparse:
            use_dense_linear(graph, *embeddings)
        fuse_steps(graph)
        RemoveUnusedNodesPass()(graph)
        save_graph(graph, building, show_progress)
        copy_companions(source.directory, building)
        manifest = _manifest(source, model, graph, dtype, cache_dtype)
        (building / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _value_dtype(source: Checkpoint | PackedCheckpoint, sparse: bool, requested: str | None) -> str:
    if requested is not None and requested not in _VALUE_DTYPES:
        raise InputError(f"value dtype '{requested}' cannot be exported: use one of {', '.join(_VALUE_DTYPES)}")
    if requested is None and isinstance(source, PackedCheckpoint) and source.quantization is not None:
        name = source.quantization.values.name
        if name not in _QUANTIZED:
            raise InputError(
                f"{source.directory} holds {name} values, for which the CPU has no kernel: pass --value-dtype float32 "
                "to serve them dequantized, at the size and speed of float32"
            )
        return name
    if not sparse and requested not in (None, "float32"):
        raise InputError(
            f"{source.directory} is not 2:4, and --value-dtype is for kept values: leave it out, the dense model is "
            "exported in float32"
        )
    if requested is not None:
        return requested
    stored = {source.value_dtype} if isinstance(source, PackedCheckpoint) else _scope_dtypes(source)
    return "bfloat16" if sparse and stored == {torch.bfloat16} else "float32"


def _scope_dtypes(source: Checkpoint) -> set[torch.dtype]:
    return {source.shards.info(name).dtype for name in source.scope}


def save_graph(graph: ir.Model, directory: Path, show_progress: bool, page_from: int = PAGE) -> None:
    """Write model.onnx and its weights; those of more than `page_from` bytes start on a page of the file."""
    total = sum(tensor.nbytes for tensor in _weights(graph))
    with byte_progress("exporting", total, show_progress) as advance:
        ir.save(
            graph,
            directory / MODEL,
            external_data=f"{MODEL}.data",
            callback=lambda tensor, _: advance(tensor.nbytes),
            max_workers=1,
            alignment=PAGE,
            align_threshold=page_from,
        )


def _quantized_embeddings(
    source: Checkpoint | PackedCheckpoint, weights: tuple[torch.Tensor, torch.Tensor], requested: Quantization | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], Quantization] | None:
    """Codes and scales of embedding and lm_head, the same pair where the two are tied: as stored, or as requested."""
    tied = weights[0] is weights[1]
    if isinstance(source, PackedCheckpoint) and source.embedding is not None:
        stored = {f"{name}.weight": source.quantized_embedding(name) for name in source.quantized_embeddings}
        embedding = next(pair for name, pair in stored.items() if name != LM_HEAD)
        return embedding, embedding if tied else stored[LM_HEAD], source.embedding
    if requested is None:
        return None
    if weights[0].shape[1] % 8:
        raise InputError(
            f"an embedding of {weights[0].shape[1]} columns cannot be quantized: it must be a multiple of 8"
        )
    embedding = quantize_dense(weights[0], requested)
    return embedding, embedding if tied else quantize_dense(weights[1], requested), requested


def _weight(module: torch.nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _weights(graph: ir.Model) -> list[ir.TensorProtocol]:
    return [value.const_value for value in graph.graph.initializers.values() if value.const_value is not None]


def copy_companions(source: Path, directory: Path) -> None:
    """Copy config and tokenizer; make tokenizer.json and chat_template.jinja where the source has older forms."""
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in COMPANION_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, directory / file)
    slow = [file for file in ("vocab.json", "vocab.txt", "tokenizer.model") if (source / file).is_file()]
    if slow and not (source / "tokenizer.json").is_file():
        load_tokenizer(source).backend_tokenizer.save(str(directory / "tokenizer.json"))
    if not (source / "chat_template.jinja").is_file():
        template = read_json(source / "tokenizer_config.json").get("chat_template")
        if isinstance(template, str):
            (directory / "chat_template.jinja").write_text(template)


def _manifest(
    source: Checkpoint | PackedCheckpoint,
    model: PreTrainedModel,
    graph: ir.Model,
    dtype: str,
    cache_dtype: str,
) -> dict[str, Any]:
    config = model.config
    nbytes = {tensor.name: tensor.nbytes for tensor in _weights(graph)}
    token_ids = _token_ids(source)
    layers = [node for node in graph.graph if node.op_type.startswith("Sparse24MatMul")]
    return {
        "version": MANIFEST_VERSION,
        "graph": GRAPH,
        "pattern": PATTERN if layers else "dense",
        "value_dtype": dtype,
        "sparse_layers": len(layers),
        "weight_bytes": sum(nbytes.values()),
        "sparse_weight_bytes": sum(nbytes[value.name] for node in layers for value in weights_of(node)),
        "num_layers": config.num_hidden_layers,
        "kv_num_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": head_dim(config),
        "cache_dtype": cache_dtype,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "eos_token_ids": token_ids("eos_token_id"),
        "bos_token_id": next(iter(token_ids("bos_token_id")), None),
        "source_fingerprint": source_fingerprint(source.directory),
        "inputs": [value.name for value in graph.graph.inputs],
    }


def _token_ids(source: Checkpoint | PackedCheckpoint) -> Callable[[str], list[int]]:
    """Look special tokens up in generation_config.json, then in config.json; always as a list."""
    generation = read_json(source.directory / "generation_config.json")

    def ids(name: str) -> list[int]:
        value = generation.get(name, source.config.get(name))
        return value if isinstance(value, list) else [] if value is None else [value]

    return ids
