"""Files and directories that appear complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion.errors import InputError


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
            unless that would delete `source`.
    """
    check_target(target, overwrite, source)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        building.chmod(0o777 & ~_umask())
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
    """Write `text` (UTF-8) beside `target`, then rename it to `target`, which may exist."""
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
