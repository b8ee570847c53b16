"""Finding the ONNX directory that a given model directory is served from, and making it the first time."""

import importlib.util
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from conversion.errors import InputError
from conversion.families import family_of
from conversion.fingerprint import source_fingerprint
from conversion.onnx import GRAPH

MANIFEST = "cast_onnx.json"


def find_onnx_dir(directory: Path, value_dtype: str | None) -> Path:
    """Return `directory` if it is an ONNX directory, else the one converted from it, which it then holds.

    The conversion is made once and kept until the source's weights or configuration change, or what is made of them.

    Args:
        directory: an ONNX, packed or dense model directory.
        value_dtype: "float32" or "bfloat16" for the kept values of a 2:4 model; None: what the source holds.

    Raises:
        InputError: `directory` is none of these, or cannot be converted.
    """
    if (directory / MANIFEST).is_file():
        return directory
    _require_known_model(directory)
    converted = directory / (f"onnx-{value_dtype}" if value_dtype else "onnx")
    if _made_from(converted) != (source_fingerprint(directory), GRAPH):
        _convert(directory, converted, value_dtype)
    return converted


def _require_known_model(directory: Path) -> None:
    config = directory / "config.json"
    if not config.is_file():
        raise InputError(f"{directory} is no model directory: it holds neither {MANIFEST} nor config.json")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{config} names no model type: copy the checkpoint again") from None
    family_of(model_type)


def _made_from(onnx_dir: Path) -> tuple[str, int] | None:
    """The fingerprint of what `onnx_dir` was converted from, and its graph; None if it is not there or not readable."""
    try:
        manifest = json.loads((onnx_dir / MANIFEST).read_text(encoding="utf-8"))
        return manifest["source_fingerprint"], manifest["graph"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _convert(directory: Path, target: Path, value_dtype: str | None) -> None:
    """Export in a process of its own, so that the server's memory stays free of torch and of the dense weights."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("onnxruntime_genai") is None:
        raise InputError(
            f"{directory} must be converted before it can be served: pip install 'cast-serve[convert]', "
            f"or run 'cast convert {directory} OUT --to onnx' where that is installed, and serve OUT"
        )
    print(f"converting {directory} to {target} for ONNX Runtime (once)", file=sys.stderr, flush=True)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            process.submit(_export, directory, target, value_dtype).result()
    except BrokenProcessPool:
        raise InputError(f"the process converting {directory} died, probably for lack of memory") from None
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None


def _export(directory: Path, target: Path, value_dtype: str | None) -> None:
    from conversion.onnx import export

    export(directory, target, value_dtype, overwrite=True, show_progress=sys.stderr.isatty())
