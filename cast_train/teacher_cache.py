"""The teacher's most likely tokens at every position, on disk: a second run with the same text needs no teacher.

Files in the directory, for R rows (blocks of text) of L - 1 predicted positions:

    ids.bin        [R, L-1, k]  uint16 or uint32
    log_probs.bin  [R, L-1, k]  float16
    tail.bin       [R, L-1]     float16, log of the mass of all other tokens
    done.bin       [R]          uint8, 1 = the row is complete
    meta.json                   what they belong to

That is 4k + 2 bytes a token with a vocabulary of up to 65,536.

The tail counts as one event: KL is taken between the distributions over the k tokens and "any other". That is a lower
bound of the true KL, and its gradient leaves the student's proportions within the tail alone.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from cast_train.dataset import TokenBlocks
from cast_train.hidden_states import last_hidden_state
from conversion.atomic import write_text
from conversion.errors import InputError
from conversion.progress import shown_progress

_VERSION = 1
_SMALLEST_LOG = -60000.0  # float16 ends at -65504; a tail of no mass at all gets this


@dataclass(frozen=True)
class TeacherCache:
    """An open cache.

    Attributes:
        ids: [R, L-1, k] token ids, the most likely first; log_probs: [R, L-1, k] float16; tail: [R, L-1] float16;
        done: [R] uint8. All memory-mapped.
    """

    ids: np.memmap
    log_probs: np.memmap
    tail: np.memmap
    done: np.memmap

    @classmethod
    def open(cls, directory: Path, identity: dict[str, Any], rows: int, positions: int, k: int, vocab: int) -> Self:
        """Open the first `rows` rows of the cache in `directory`, or make an empty one, whole or not at all.

        Args:
            rows: no more than the cache holds; which text a row has does not depend on their number.
            identity: what the numbers depend on beside their shape: text, seed, teacher, precision.

        Raises:
            InputError: the directory holds a cache of something else (every difference is named), or the disk is full.
        """
        if not 0 < k < vocab:
            raise InputError(f"the teacher cache keeps between 1 and {vocab - 1} tokens a position, not {k}")
        shape = {"rows": rows, "positions": positions, "k": k, "vocabulary": vocab}
        meta = json.loads(json.dumps({"version": _VERSION, **shape, **identity}))
        path = directory / "meta.json"
        found = path.is_file()
        if found:
            saved = json.loads(path.read_text())
            differences = [
                f"{name} was {saved.get(name)}, is {meta.get(name)}"
                for name in sorted(saved.keys() | meta.keys())
                if saved.get(name) != meta.get(name) and not (name == "rows" and saved.get(name, 0) > rows)
            ]
            if differences:
                raise InputError(
                    f"the teacher cache {directory} belongs to another run ({'; '.join(differences)}): name another "
                    "directory"
                )
            saved_rows = saved["rows"]
        elif directory.is_dir() and any(directory.iterdir()):
            raise InputError(f"{directory} is not empty and holds no teacher cache: name another directory")
        else:
            directory.mkdir(parents=True, exist_ok=True)
            saved_rows = rows
        small = vocab <= 1 << 16
        try:
            if not found:  # first, so that what a kill leaves is known for an unfinished cache
                write_text(path, json.dumps(meta, indent=1) + "\n")
            arrays = (
                _map(directory / "ids.bin", (saved_rows, positions, k), np.uint16 if small else np.uint32),
                _map(directory / "log_probs.bin", (saved_rows, positions, k), np.float16),
                _map(directory / "tail.bin", (saved_rows, positions), np.float16),
                _map(directory / "done.bin", (saved_rows,), np.uint8),
            )
        except BaseException:
            for file in () if found else directory.iterdir():
                file.unlink()
            raise
        return cls(*(array[:rows] for array in arrays))  # type: ignore[arg-type]  # part of a map is one

    def row(self, number: int) -> dict[str, Tensor]:
        """Return a row as the loss takes it: ids [L-1, k] int64, log-probs [L-1, k] and tail [L-1] float32."""
        return {
            "teacher_ids": torch.from_numpy(self.ids[number].astype(np.int64)),
            "teacher_log_probs": torch.from_numpy(self.log_probs[number].astype(np.float32)),
            "teacher_tail": torch.from_numpy(self.tail[number].astype(np.float32)),
        }


def _map(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    """Map a file, made if need be and of the right size: InputError now, and not SIGBUS later, if the disk is full."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with path.open("ab") as file:
        if file.tell() != size:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise InputError(
                    f"{path} needs {size / 1e9:.3g} GB and cannot be made ({error.strerror}): free some, or keep fewer "
                    "tokens a position"
                ) from None
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


class CachedBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of text together with what the cache holds of their teacher."""

    def __init__(self, blocks: TokenBlocks, cache: TeacherCache) -> None:
        self._blocks = blocks
        self._cache = cache

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._blocks[index] | self._cache.row(self._blocks.row(index))


@torch.no_grad()
def fill(
    cache: TeacherCache,
    blocks: TokenBlocks,
    teacher: PreTrainedModel,
    *,
    batch: int,
    bf16: bool,
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> None:
    """Run the teacher over the rows that are not complete; may be interrupted and called again.

    Args:
        teacher: on its device, in the precision that training would run it in.
        batch: rows run at once.
        bf16: run its passes under autocast to bfloat16.
        part: (i, n): do only every n-th row, from the i-th: processes share the work.
        progress: show it.
    """
    device, k = teacher.device, cache.ids.shape[2]
    left = [row for row in range(part[0], len(cache.done), part[1]) if not cache.done[row]]
    head = teacher.get_output_embeddings().weight
    with shown_progress("running the teacher", len(left), progress) as advance:
        for start in range(0, len(left), batch):
            rows = left[start : start + batch]
            ids = torch.stack([blocks[row]["input_ids"] for row in rows]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                hidden = last_hidden_state(teacher, ids)[:, :-1]
                for row, hidden_row in zip(rows, hidden, strict=True):
                    top, log_probs, tail = top_k(F.linear(hidden_row.to(head.dtype), head), k)
                    cache.ids[row] = top.cpu().numpy()
                    cache.log_probs[row] = log_probs.cpu().numpy()
                    cache.tail[row] = tail.cpu().numpy()
            for array in (cache.ids, cache.log_probs, cache.tail):
                array.flush()
            cache.done[rows] = 1
            advance(len(rows))


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [T, k], their log-probabilities [T, k] and the log of the other tokens' mass [T] of logits [T, V]."""
    logits = logits.float()
    log_z = logits.logsumexp(1, keepdim=True)
    values, ids = logits.topk(k, dim=1)
    tail = logits.scatter(1, ids, float("-inf")).logsumexp(1) - log_z[:, 0]
    return ids, values - log_z, tail.clamp(min=_SMALLEST_LOG)
