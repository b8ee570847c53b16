"""Export a 2:4 model to a directory that onnxruntime-genai runs on an NVIDIA GPU."""

import contextlib
import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from cast_serve.genai.gpu_matmul import use_gpu_matmul
from cast_serve.kernels import library_path
from conversion.atomic import new_directory
from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_model
from conversion.errors import InputError
from conversion.onnx.dense_linear import EMBEDDING
from conversion.onnx.export_model import copy_companions, save_graph
from conversion.onnx.paged_attention import attention_window
from conversion.onnx.stock_graph import stock_builder
from conversion.packed_checkpoint import PackedCheckpoint, open_checkpoint

CONFIG = "genai_config.json"
LIBRARY = "libcast24.so"


def export_genai(
    source_dir: str | Path, out_dir: str | Path, *, overwrite: bool = False, show_progress: bool = False
) -> int:
    """Export a 2:4 Hugging Face model directory, packed or dense-stored; return the number of 2:4 operators.

    The graph is the model builder's for CUDA in float16, with our operator for each linear of the blocks. Quantized
    values stay so, and meet activations that are not rounded; a quantized embedding is dequantized. The library of
    operators lies beside the graph, and the kernels' code inside it.

    Raises:
        InputError: the source is not 2:4, does not fit float16, has groups of 32 or an architecture that is not
            supported; `out_dir` exists; or NVRTC is missing.
    """
    source = open_checkpoint(source_dir)
    if isinstance(source, Checkpoint) and (violation := source.first_violation()) is not None:
        raise InputError(f"{violation}: only 2:4 models have kernels of ours")
    quantized = source if isinstance(source, PackedCheckpoint) and source.quantization is not None else None
    with new_directory(Path(out_dir), overwrite, source.directory, [CONFIG]) as building:
        model = dense_model(source, torch.float16)
        if any(not tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise InputError(f"{source.directory} has weights beyond float16, in which GPUs are to run it")
        builder = stock_builder(model, "cuda", ir.DataType.FLOAT16)
        _use_window(builder.model, model.config)
        operators = use_gpu_matmul(builder.model, quantized)
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            _share_embedding(builder.model)
        RemoveUnusedNodesPass()(builder.model)  # dense weights
        save_graph(builder.model, building, show_progress, page_from=0)  # kernels read 16 bytes at once
        copy_companions(source.directory, building)
        _write_config(builder, model.config, building)
        shutil.copyfile(library_path(), building / LIBRARY)
    return operators


def _use_window(graph: ir.Model, config: Any) -> None:
    """Let each layer attend as far as transformers lets it: the builder forgets Mistral's window."""
    attention = [node for node in graph.graph if node.op_type == "GroupQueryAttention"]
    for layer, node in enumerate(attention):
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", attention_window(config, layer))


def _share_embedding(graph: ir.Model) -> None:
    """Let lm_head read the tied embedding [V, H] as it lies there; the builder stores it once more, transposed."""
    logits = graph.graph.outputs[0]
    head = logits.producer()
    assert head is not None
    assert head.op_type == "MatMul"
    inputs = [head.inputs[0], graph.graph.initializers[EMBEDDING]]
    shared = ir.node("FusedMatMul", inputs, {"transB": 1}, domain="com.microsoft", name="/lm_head/FusedMatMul")
    ir.convenience.replace_nodes_and_values(graph.graph, head, [head], [shared], [logits], [shared.outputs[0]])


def _write_config(builder: Any, config: Any, directory: Path) -> None:
    """genai_config.json as the builder writes it, and our library in it, by a path in the directory."""
    builder.model_name_or_path = str(directory)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its steps
        builder.make_genai_config(copy.deepcopy(config), {}, str(directory))
    path = directory / CONFIG
    written = json.loads(path.read_text())
    written["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY
    path.write_text(json.dumps(written, indent=2) + "\n")
