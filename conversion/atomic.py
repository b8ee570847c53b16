"""Files and directories that appear complete or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from conversion.errors import InputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_target(target: Path, overwrite: bool = False, source: Path | None = None) -> None:
    """Raise the InputError that `new_directory` would, without making anything."""
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise InputError(f"writing {target} would replace its source {source}: choose another output directory")
    if target.exists() and not overwrite:
        raise InputError(f"{target} already exists: choose another output directory or pass --overwrite")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file: choose a directory as output")


@contextmanager
def new_directory(target: Path, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Yield a directory beside `target` that takes its name if the body succeeds and is deleted if it does not.

    Raises:
        InputError: `target` exists and `overwrite` is false; with `overwrite` the old one is replaced at the very end,
            unless that would delete `source`. Or the disk is full.
    """
    check_target(target, overwrite, source)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        building.chmod(0o777 & ~_umask())
        with room_for(target):
            yield building
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.rename(target, replaced / target.name)
            os.rename(building, target)
            shutil.rmtree(replaced)
        else:
            os.rename(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


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
