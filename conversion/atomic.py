"""Files and directories that appear complete or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from conversion.errors import InputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


# Of the directories that commands make each holds one of these: model directories, and reports of the scaling law.
_MADE = ("config.json", "scaling-law.json")


def check_target(
    target: Path, overwrite: bool = False, source: Path | None = None, made: Sequence[str] = _MADE
) -> None:
    """Raise the InputError that `new_directory` would, without making anything."""
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise InputError(f"writing {target} would replace its source {source}: choose another output directory")
    if target.exists() and not overwrite:
        raise InputError(f"{target} already exists: choose another output directory or pass --overwrite")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file: choose a directory as output")
    if target.exists() and any(target.iterdir()) and not any((target / name).is_file() for name in made):
        raise InputError(
            f"{target} holds other files than would replace it (there is no {' or '.join(made)}): "
            "choose another output directory, or delete it yourself"
        )
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{target} cannot be made, {parent} is no directory that you may write to: mend that, or choose another"
        )


@contextmanager
def new_directory(
    target: Path, overwrite: bool = False, source: Path | None = None, made: Sequence[str] = _MADE
) -> Iterator[Path]:
    """Yield a directory beside `target` that takes its name if the body succeeds and is deleted if it does not.

    Args:
        overwrite: replace an existing `target`, at the very end.
        source: what must not be replaced.
        made: only a directory that holds one of these files, or nothing, is replaced: others were made by someone else.

    Raises:
        InputError: `target` exists and may not be replaced, cannot be made, or the disk is full.
    """
    check_target(target, overwrite, source, made)
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target} cannot be made ({error.strerror}): choose another output directory") from None
    try:
        building.chmod(0o777 & ~_umask())
        with room_for(target):
            yield building
        if target.exists():
            _replace(target, building)
        else:
            os.rename(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _replace(target: Path, building: Path) -> None:
    """Put `building` in the place of `target`, which stays there if that fails."""
    replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    old = replaced / target.name
    try:
        os.rename(target, old)
        os.rename(building, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        replaced.rmdir()
        raise
    shutil.rmtree(replaced)


def write_text(target: Path, text: str) -> None:
    """Write `text` (UTF-8) beside `target`, then rename it to `target`, which may exist. InputError on a full disk."""
    partial = target.with_name(f".{target.name}.partial")
    with room_for(target):
        partial.write_text(text, encoding="utf-8")
    partial.replace(target)


@contextmanager
def room_for(target: Path) -> Iterator[None]:
    """Turn the error of whoever meets a full disk, or file-size limit, into an InputError that names `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has no errno, only Rust's text of it
        if getattr(error, "errno", None) in _FULL or any(f"(os error {number})" in str(error) for number in _FULL):
            raise InputError(f"{target} could not be written ({error}): make room on the disk and try again") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
