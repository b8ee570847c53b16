"""One exported model in ONNX Runtime: loading, and running a ragged batch over the paged cache."""

import threading
from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np
import onnxruntime as ort

from cast_serve.engine.kv_cache import BLOCK_TOKENS, CacheMemory, blocks_for
from cast_serve.engine.library import executed
from cast_serve.engine.manifest import Manifest, read_manifest
from cast_serve.engine.scheduler import Chunk
from cast_serve.engine.types import ModelInfo
from cast_serve.kernels import isa, library_path
from conversion.errors import InputError

# What a session executes is counted in the library, for the whole process: one model is loaded at a time.
_loading = threading.Lock()


class OnnxModel:
    """A session whose inputs are views of arrays made once; a step only fills them in."""

    def __init__(
        self, onnx_dir: Path, *, max_batch_size: int, step_tokens: int, kv_cache_tokens: int | None, threads: int | None
    ) -> None:
        manifest = read_manifest(onnx_dir)
        if kv_cache_tokens is None:
            kv_cache_tokens = max_batch_size * min(manifest.context_length, 2048)
        self.blocks = blocks_for(kv_cache_tokens)
        context = min(manifest.context_length, self.blocks * BLOCK_TOKENS)
        self._rows = max_batch_size
        row_blocks = blocks_for(context)
        self._arrays: dict[str, np.ndarray] = {
            "input_ids": np.zeros(step_tokens, np.int64),
            "position_ids": np.zeros(step_tokens, np.int64),
            "logits_rows": np.zeros(max_batch_size, np.int64),
            "block_table": np.zeros((max_batch_size, row_blocks), np.int32),
            "past_lens": np.zeros(max_batch_size, np.int32),
            "cu_seqlens": np.zeros(max_batch_size + 1, np.int32),
            "logits": np.zeros((max_batch_size, manifest.vocab_size), np.float32),
        }
        self._views: dict[tuple[str, int], ort.OrtValue] = {}
        self._bound: dict[str, int] = {}
        with _loading:
            before, bytes_before = _sparse_executed()
            self._session = load_session(onnx_dir, threads)
            self._bind_caches(onnx_dir, manifest)
            self._warm_up(onnx_dir)
            after, bytes_after = _sparse_executed()
        if after - before != manifest.sparse_layers:
            raise InputError(
                f"{onnx_dir}: cast_onnx.json speaks of {manifest.sparse_layers} sparse layers, "
                f"but model.onnx executes {after - before}: export the model again"
            )
        self.info = ModelInfo(
            pattern=manifest.pattern,
            value_dtype=manifest.value_dtype,
            sparse_layers=after - before,
            weight_bytes=manifest.weight_bytes,
            sparse_weight_bytes=bytes_after - bytes_before,
            context_length=context,
            vocab_size=manifest.vocab_size,
            kernel=isa(),
        )

    def run(self, chunks: Items[Chunk]) -> np.ndarray:
        """Compute the chunks' tokens into the cache.

        Returns:
            Logits [R, V] float32 of the last token of each chunk that is its sequence's last, in order; a view that the
            next call overwrites.
        """
        arrays = self._arrays
        rows = tokens = 0
        for b, chunk in enumerate(chunks):
            sequence, start = chunk.sequence, chunk.sequence.computed
            end = tokens + chunk.tokens
            arrays["input_ids"][tokens:end] = sequence.tokens[start : start + chunk.tokens]
            if self._has_positions:
                arrays["position_ids"][tokens:end] = np.arange(start, start + chunk.tokens)
            arrays["block_table"][b, : len(sequence.blocks)] = sequence.blocks
            arrays["past_lens"][b] = start
            arrays["cu_seqlens"][b + 1] = tokens = end
            if chunk.last:
                arrays["logits_rows"][rows] = end - 1
                rows += 1
        return self._run(len(chunks), tokens, rows)

    def release_caches(self) -> None:
        """Give the caches' memory back to the system; only while no sequence holds blocks."""
        self._caches.release()

    def _run(self, batch: int, tokens: int, rows: int) -> np.ndarray:
        lengths = {"input_ids": tokens, "logits_rows": rows, "block_table": batch, "past_lens": batch}
        lengths["cu_seqlens"] = batch + 1
        if self._has_positions:
            lengths["position_ids"] = tokens
        for name, length in lengths.items():
            if self._bound.get(name) != length:
                self._binding.bind_ortvalue_input(name, self._view(name, length))
                self._bound[name] = length
        if self._bound.get("logits") != rows:
            self._binding.bind_ortvalue_output("logits", self._view("logits", rows))
            self._bound["logits"] = rows
        self._session.run_with_iobinding(self._binding)
        return self._arrays["logits"][:rows]

    def _view(self, name: str, length: int) -> ort.OrtValue:
        """The first `length` rows of an array as an OrtValue on the same memory, in the shape that the graph wants."""
        if (name, length) not in self._views:
            array = self._arrays[name][:length]
            if name in ("input_ids", "position_ids", "logits"):
                array = array[None]
            self._views[name, length] = ort.OrtValue.ortvalue_from_numpy(array)
        return self._views[name, length]

    def _bind_caches(self, onnx_dir: Path, manifest: Manifest) -> None:
        names = [node.name for node in self._session.get_inputs()]
        if sorted(names) != sorted(manifest.inputs):
            raise InputError(f"{onnx_dir}: model.onnx and cast_onnx.json name different inputs: export the model again")
        self._has_positions = "position_ids" in names
        self._caches = CacheMemory(manifest, self.blocks)
        self._binding = self._session.io_binding()
        for name, cache in self._caches.inputs.items():
            self._binding.bind_ortvalue_input(name, cache)

    def _warm_up(self, onnx_dir: Path) -> None:
        """Run one token (into block 0, which nobody holds yet): every page of the weights is then in memory."""
        self._arrays["cu_seqlens"][1] = 1
        try:
            self._run(batch=1, tokens=1, rows=1)
        except Exception as error:
            raise InputError(f"{onnx_dir} cannot be executed ({_first_line(error)}): export the model again") from None


def _sparse_executed() -> tuple[int, int]:
    """2:4 layers of this process's sessions that have run, and the bytes of their weights."""
    nodes, weight_bytes = zip(executed("Sparse24MatMul"), executed("Sparse24MatMulNBits"), strict=True)
    return sum(nodes), sum(weight_bytes)


def load_session(onnx_dir: Path, threads: int | None, profile: Path | None = None) -> ort.InferenceSession:
    """Load an exported graph with our operators; InputError if ONNX Runtime cannot.

    Args:
        onnx_dir: the exported model.
        threads: of the computation; None leaves them to ONNX Runtime.
        profile: what the name of ONNX Runtime's profile begins with; None writes none.
    """
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.log_severity_level = 4  # failures come back as exceptions, and are reported once
    try:
        return ort.InferenceSession(str(onnx_dir / "model.onnx"), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{onnx_dir} cannot be loaded ({_first_line(error)}): export the model again") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].removeprefix("[ONNXRuntimeError] : ")
