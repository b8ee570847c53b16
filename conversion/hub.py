"""The model that a command starts from, as a local directory."""

from pathlib import Path

from conversion.errors import InputError

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


def local_model(source: str | Path) -> Path:
    """Return the directory `source`, or download the hub model of that id. InputError if it is neither."""
    directory = Path(source)
    if directory.is_dir():
        return directory
    if directory.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise InputError(f"{source} does not exist: give a model directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise InputError(
            f"'{source}' is no local directory and no model that the hub gives: check the name and the connection"
        ) from None
