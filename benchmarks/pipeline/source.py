"""The model that the pipeline starts from, as a local directory."""

from pathlib import Path

from conversion.errors import InputError


def local_model(source: str) -> Path:
    """Return the directory `source`, or download the hub model of that id. InputError if it is neither."""
    directory = Path(source)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.*"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise InputError(
            f"'{source}' is no local directory and no model that the hub gives: check the name and the connection"
        ) from None
