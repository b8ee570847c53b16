"""Safetensors shards of a checkpoint directory: read tensor by tensor, written tensor by tensor."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conversion.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shards:
    """The tensors of a checkpoint directory. Opening reads the headers only; each tensor is read when asked for.

    Raises:
        InputError: no directory, no safetensors in it (pickles are never opened), a shard that is missing, truncated or
            damaged, or a tensor that the index names and no shard holds.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = _read_index(directory)
        self.infos: dict[str, TensorInfo] = {}
        for shard in self._shard_names():
            with self._open(shard) as file:
                for name in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                    view = file.get_slice(name)
                    stored = view.get_dtype()
                    if stored not in _DTYPES:
                        raise InputError(
                            f"tensor '{name}' of {directory / shard} has dtype {stored}, which is not supported"
                        )
                    self.infos[name] = TensorInfo(shard, tuple(view.get_shape()), _DTYPES[stored])
        for name, shard in self.index.get("weight_map", {}).items():
            if name not in self.infos:
                raise InputError(
                    f"tensor '{name}' is missing from {directory / shard}, though the index names it: "
                    "copy or make the checkpoint again"
                )

    def _shard_names(self) -> list[str]:
        return sorted(set(self.index["weight_map"].values())) if "weight_map" in self.index else [SINGLE]

    def _open(self, shard: str) -> safe_open:
        path = self.directory / shard
        if not path.is_file():
            raise InputError(f"shard {path} is missing: copy the checkpoint again")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise InputError(f"shard {path} is truncated or damaged ({error}): copy or make it again") from None

    def tensor(self, name: str) -> Tensor:
        """Read one tensor (mapped from the file, so its memory is the page cache's)."""
        info = self.info(name)
        with self._open(info.shard) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and shard of a tensor; InputError if there is none of that name."""
        if name not in self.infos:
            raise InputError(f"tensor '{name}' is missing from {self.directory}: copy or make the checkpoint again")
        return self.infos[name]

    def by_shard(self) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
        """Every shard's name with its tensors."""
        for shard in self._shard_names():
            yield shard, {name: info for name, info in self.infos.items() if info.shard == shard}


def _read_index(directory: Path) -> dict:
    """The shard index, or {} where the whole checkpoint is one file."""
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give the path of a model directory")
    if (directory / INDEX).is_file():
        try:
            index: dict = json.loads((directory / INDEX).read_text())
            shards = set(index["weight_map"].values())
            index.get("metadata", {}).get("sha256", {}).items()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{directory / INDEX} is not a shard index: copy the checkpoint again") from None
        for shard in shards:  # names of files are also made of them: none may lead out of the directory
            if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(".safetensors"):
                raise InputError(
                    f"{directory / INDEX} names a shard '{shard}', which is no safetensors file of that directory: "
                    "copy the checkpoint again"
                )
        return index
    if (directory / SINGLE).is_file():
        return {}
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise InputError(
            f"{directory} holds weights as pickles only, which can run code when loaded: "
            "save it with safetensors (model.save_pretrained) first"
        )
    raise InputError(f"{directory} holds no {SINGLE} or {INDEX}: give the path of a model directory")


class ShardWriter:
    """Writes one safetensors file tensor by tensor, so that no more than one is in memory.

    safetensors' own writer takes all tensors at once. The format is 8 bytes of header length, a JSON header, raw data.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Write the header for tensors of these shapes and dtypes; `write` must then be called in the same order."""
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in layout.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._pending = [(name, *spec) for name, spec in layout.items()]
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> str:
        """Append one tensor and return the SHA-256 of its bytes."""
        expected = self._pending.pop(0)
        if expected != (name, tuple(tensor.shape), tensor.dtype):
            raise AssertionError(f"expected tensor {expected}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
        data = tensor_bytes(tensor)
        self._file.write(data)
        return hashlib.sha256(data).hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._pending:
            raise AssertionError(f"tensors never written: {[name for name, *_ in self._pending]}")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it already is."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
