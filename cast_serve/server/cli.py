"""`cast serve`."""

import enum
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from conversion.errors import InputError
from conversion.hub import local_model, model_name


class ValueDtype(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class SparseMemory(enum.StrEnum):
    low = "low"
    fast = "fast"


class Engine(enum.StrEnum):
    onnxruntime = "onnxruntime"
    vllm = "vllm"


def serve(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="ONNX, packed or dense model, or its hub id.")],
    engine: Annotated[
        Engine, typer.Option(help="vllm: vLLM's own server, to which all further arguments, after DIR, are passed on.")
    ] = Engine.onnxruntime,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="Model id in the API; default: the directory's name.")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Most sequences in one engine step.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Most sequences that wait; more are answered with 429.")] = 256,
    kv_cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the KV cache holds; default: chosen by the engine.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that compute; default: all usable cores.")] = None,
    value_dtype: Annotated[
        ValueDtype | None, typer.Option(help="Dtype of a 2:4 model's kept values; default: as DIR holds them.")
    ] = None,
    sparse_memory: Annotated[
        SparseMemory | None,
        typer.Option(
            help="vLLM on a GPU: low (default) keeps one copy of each weight, fast another one for cuSPARSELt."
        ),
    ] = None,
) -> None:
    """Serve a model behind an OpenAI-compatible endpoint (/v1/completions, /v1/chat/completions, /metrics).

    DIR is a directory made by `cast convert --to onnx`, or a packed or dense Hugging Face directory; that one is
    converted first, once, into DIR/cast-onnx (DIR/cast-onnx-bfloat16 with --value-dtype bfloat16).

    On vLLM, with its settings: cast serve DIR --engine vllm --port 8000 --max-model-len 4096 --tensor-parallel-size 2
    """
    if engine is Engine.vllm:
        _serve_on_vllm(context, local_model(directory))
        return
    if sparse_memory is not None:
        raise InputError("--sparse-memory is for GPUs, which --engine vllm serves on: leave it out")
    if context.args:
        raise InputError(f"cast serve has no argument '{context.args[0]}': only --engine vllm passes others on")
    _require_packages()
    from cast_serve.server.listen import bind
    from cast_serve.server.model_dir import find_onnx_dir

    directory = local_model(directory)
    listener = bind(host, port)
    onnx_dir = find_onnx_dir(directory, value_dtype.value if value_dtype else None)
    name = served_model_name or model_name(directory)

    from cast_serve.server.model import ServedModel
    from cast_serve.server.run import run

    run(
        listener,
        lambda: ServedModel.load(
            onnx_dir, name, max_batch_size=max_batch_size, kv_cache_tokens=kv_cache_tokens, threads=threads
        ),
        capacity=max_batch_size + max_queue,
    )


def _serve_on_vllm(context: typer.Context, directory: Path) -> None:
    """Become vLLM's server; the options that it has too are passed on under its names."""
    from cast_serve.server.vllm_server import exec_vllm

    given = {name: value for name, value in context.params.items() if _was_given(context, name)}
    for name in ("max_queue", "kv_cache_tokens"):
        if name in given:
            raise InputError(f"--{name.replace('_', '-')} is for --engine onnxruntime: leave it out")
    arguments = ["--host", context.params["host"], "--port", str(context.params["port"])]
    arguments += ["--served-model-name", given.get("served_model_name", model_name(directory))]
    if "max_batch_size" in given:
        arguments += ["--max-num-seqs", str(given["max_batch_size"])]
    if "value_dtype" in given:
        arguments += ["--dtype", given["value_dtype"].value]
    sparse_memory = given["sparse_memory"].value if "sparse_memory" in given else None
    exec_vllm(directory, [*arguments, *context.args], threads=given.get("threads"), sparse_memory=sparse_memory)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _require_packages() -> None:
    for package in ("onnxruntime", "fastapi", "uvicorn", "prometheus_client", "tokenizers", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"cast serve needs the package '{package}': pip install 'cast-serve[serve]'")
