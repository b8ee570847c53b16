"""The model that a command is given, as a local directory."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from conversion.errors import InputError

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "model.onnx*"]
_UNWANTED = ["*/*", "consolidated*"]  # the same model in other programs' formats


def local_model(source: str | Path, wanted: Sequence[str] = WANTED) -> Path:
    """Return the directory `source`, or download the `wanted` files of the hub model of that id.

    InputError if it is neither.
    """
    directory = Path(source)
    if directory.is_dir():
        return directory
    if directory.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise InputError(f"{source} does not exist: give a model directory or a hub id")
    return _download(str(source), tuple(wanted))


@cache  # the hub is asked once, and all of a run sees the same commit
def _download(name: str, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=_UNWANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise InputError(
            f"'{name}' is no local directory and no model that the hub gives: check the name, the connection and, "
            "where a model asks for consent, that you are logged in (hf auth login)"
        ) from None


def model_name(model: str | Path) -> str:
    """What to call a model: its directory's name, or in the hub's cache the repository's."""
    directory = Path(model).resolve()
    if directory.parent.name == "snapshots":
        return directory.parent.parent.name.rpartition("--")[2]
    return directory.name
