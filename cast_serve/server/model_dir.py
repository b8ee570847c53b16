"""Finding the ONNX directory that a given model directory is served from, and making it the first time."""

import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from conversion.command import exit_on_sigterm
from conversion.errors import InputError
from conversion.families import family_of
from conversion.fingerprint import source_fingerprint
from conversion.model_config import read_config
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
    # not "onnx", which is a directory of the model's own in many repositories of the hub
    converted = directory / (f"cast-onnx-{value_dtype}" if value_dtype else "cast-onnx")
    if _made_from(converted) != (source_fingerprint(directory), GRAPH):
        _convert(directory, converted, value_dtype)
    return converted


def _require_known_model(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} is no model directory: it holds neither {MANIFEST} nor config.json")
    family_of(read_config(directory)["model_type"])


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
    from conversion.atomic import check_target

    check_target(target, overwrite=True, made=[MANIFEST])
    print(f"converting {directory} to {target} for ONNX Runtime (once)", file=sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    outcome, report = context.Pipe(duplex=False)
    process = context.Process(target=_export, args=(report, directory, target, value_dtype))
    process.start()
    report.close()
    try:
        error = outcome.recv()
    except EOFError:
        raise InputError(f"the process converting {directory} died, probably for lack of memory") from None
    except BaseException:  # told to stop; where it has reported, it ends by itself
        process.terminate()
        raise
    finally:
        process.join()
    if isinstance(error, OSError):
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None
    if error is not None:
        raise error


def _export(report: Connection, directory: Path, target: Path, value_dtype: str | None) -> None:
    """Export, and send the error that ended it, or None. Ends, without a trace, when the server does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to both, and the server passes it on as SIGTERM
    exit_on_sigterm()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from conversion.onnx import export

    try:
        export(directory, target, value_dtype, overwrite=True, show_progress=sys.stderr.isatty())
    except Exception as error:
        error.add_note(traceback.format_exc())
        report.send(error)
    else:
        report.send(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
