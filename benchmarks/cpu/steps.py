"""An exported graph computed step by step, without the engine's scheduler around it."""

from pathlib import Path

import numpy as np
import onnxruntime

from cast_serve.engine.kv_cache import CacheMemory, blocks_for
from cast_serve.engine.manifest import read_manifest
from cast_serve.engine.onnx_model import load_session


class Steps:
    """Sequences of equal length, over a paged cache of their own.

    Args:
        onnx_dir: the exported model.
        threads: of the computation.
        sequences: most at once.
        tokens: most of each.
        profile: what the name of ONNX Runtime's profile begins with; None writes none.
    """

    def __init__(self, onnx_dir: Path, threads: int, sequences: int, tokens: int, profile: Path | None = None) -> None:
        manifest = read_manifest(onnx_dir)
        self.session = load_session(onnx_dir, threads, profile)
        blocks = blocks_for(tokens)
        self._table = np.arange(sequences * blocks, dtype=np.int32).reshape(sequences, blocks)
        self._caches = CacheMemory(manifest, sequences * blocks).inputs
        self._has_positions = "position_ids" in manifest.inputs

    def run(self, tokens: np.ndarray, past: int) -> np.ndarray:
        """Compute `tokens` [B, T], which come after `past` others of each sequence.

        Returns:
            Logits [B * T, V] float32, of every token.
        """
        sequences, length = tokens.shape
        feeds = {
            "input_ids": tokens.reshape(1, -1).astype(np.int64),
            "logits_rows": np.arange(tokens.size),
            "block_table": self._table[:sequences],
            "past_lens": np.full(sequences, past, np.int32),
            "cu_seqlens": np.arange(sequences + 1, dtype=np.int32) * np.int32(length),
        }
        if self._has_positions:
            feeds["position_ids"] = np.tile(np.arange(past, past + length), sequences)[None]
        given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        logits: np.ndarray = self.session.run_with_ort_values(["logits"], given | self._caches)[0].numpy()[0]
        return logits
