"""`cast serve --engine vllm`: vLLM's own OpenAI server, in place of this process."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import psutil

from cast_serve.engine.cores import usable_cores
from conversion.errors import InputError
from conversion.model_config import read_config
from conversion.packed_checkpoint import PackedCheckpoint, is_packed

MOST_KV_CACHE = 4 << 30


def exec_vllm(directory: Path, arguments: list[str], *, threads: int | None, sparse_memory: str | None) -> None:
    """Check `directory` and become `vllm serve directory arguments`; does not return.

    Raises:
        InputError: vLLM is not installed, the checkpoint is damaged as far as its headers tell, or `sparse_memory` is
            asked of vLLM for CPUs.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "cast serve --engine vllm needs vLLM: pip install 'cast-serve[vllm]' where there is a GPU, "
            "python -m cast_serve.vllm_plugin.install_cpu where there is none"
        )
    if is_packed(read_config(directory)):
        PackedCheckpoint(directory)
        if "--enable-lora" in arguments:
            raise InputError("LoRA adapters do not run on 2:4 layers: leave --enable-lora out")
    on_cpu = version("vllm").endswith("cpu")
    if on_cpu and sparse_memory is not None:
        raise InputError("--sparse-memory is for GPUs, and this vLLM is for CPUs: leave it out")
    environment = cpu_environment(os.environ, threads) if on_cpu else dict(os.environ)
    if sparse_memory is not None:
        environment["CAST24_SPARSE_MEMORY"] = sparse_memory
    os.execve(sys.executable, command(directory, arguments, on_cpu=on_cpu), environment)


def command(directory: Path, arguments: list[str], *, on_cpu: bool) -> list[str]:
    """What to run.

    vLLM rounds float32 models to 16 bits unless told not to; `cast serve` serves what is stored. On a CPU vLLM wants
    92 % of the memory, mostly for the KV cache, and does not start where others use more than the rest.
    """
    config = read_config(directory)
    named = {argument.split("=")[0] for argument in arguments}
    ours = []
    if config.get("dtype", config.get("torch_dtype")) == "float32" and "--dtype" not in named:
        ours += ["--dtype", "float32"]
    if on_cpu and not named & {"--kv-cache-memory-bytes", "--gpu-memory-utilization"}:
        ours += ["--kv-cache-memory-bytes", str(min(MOST_KV_CACHE, psutil.virtual_memory().total // 4))]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(directory), *ours, *arguments]


def cpu_environment(given: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """`given` with what makes vLLM fast on a CPU, where it says nothing else.

    vLLM keeps a core for itself, which with few cores halves the speed; and its ahead-of-time compilation is done anew
    at every start there.
    """
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads or usable_cores()),
        "VLLM_USE_AOT_COMPILE": "0",
    }
    chosen = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return defaults | dict(given) | chosen
