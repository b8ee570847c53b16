"""`cast serve --engine vllm`: vLLM's own OpenAI server, in place of this process."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from cast_serve.engine.cores import usable_cores
from conversion.errors import InputError
from conversion.model_config import read_config
from conversion.packed_checkpoint import PackedCheckpoint, is_packed


def exec_vllm(directory: Path, arguments: list[str], *, threads: int | None) -> None:
    """Check `directory` and become `vllm serve directory arguments`; does not return.

    Raises:
        InputError: vLLM is not installed, or the checkpoint is damaged as far as its headers tell.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "cast serve --engine vllm needs vLLM: pip install 'cast-serve[vllm]' where there is a GPU, "
            "python -m cast_serve.vllm_plugin.install_cpu where there is none"
        )
    if is_packed(read_config(directory)):
        PackedCheckpoint(directory)
    os.execve(sys.executable, command(directory, arguments), environment(os.environ, threads))


def command(directory: Path, arguments: list[str]) -> list[str]:
    """What to run. vLLM rounds float32 models to 16 bits unless told not to; `cast serve` serves what is stored."""
    config = read_config(directory)
    stored = config.get("dtype", config.get("torch_dtype"))
    named = any(argument.split("=")[0] == "--dtype" for argument in arguments)
    keep = ["--dtype", "float32"] if stored == "float32" and not named else []
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(directory), *keep, *arguments]


def environment(given: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """`given` with what makes vLLM fast on a CPU, where it says nothing else.

    vLLM keeps a core for itself, which with few cores halves the speed; and its ahead-of-time compilation is done anew
    at every start there.
    """
    if not version("vllm").endswith("cpu"):
        return dict(given)
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads or usable_cores()),
        "VLLM_USE_AOT_COMPILE": "0",
    }
    chosen = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return defaults | dict(given) | chosen
