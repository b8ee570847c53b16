"""Exported graphs against transformers, on ragged batches over two steps."""

import json

import numpy as np
import onnx
import pytest
import torch
from transformers import GPT2Config, OPTConfig

from conversion import save_packed
from conversion.errors import InputError
from conversion.onnx import export
from tests.conversion.models import CONFIGS, make_model
from tests.conversion.reference_ops import evaluator

BLOCK_SIZE = 4
PROMPTS = [[5, 17, 3, 88, 41, 2, 60], [9], [33, 12, 71, 4]]
NEXT = [[7, 11], [13], [54]]


def run_steps(directory, run):
    """Prefill three sequences at once, then feed each some more tokens; logits of every token, per sequence."""
    manifest = json.loads((directory / "cast_onnx.json").read_text())
    shape = (12, BLOCK_SIZE, manifest["kv_num_heads"], manifest["head_dim"])
    caches = {name: np.full(shape, np.nan, np.float32) for name in manifest["inputs"] if "_cache." in name}
    table = np.array([[7, 2, 11], [4, 0, 1], [9, 3, 5]], np.int32)
    past = np.zeros(3, np.int32)
    logits = [[], [], []]
    for step in (PROMPTS, NEXT):
        lengths = np.array([len(tokens) for tokens in step])
        feeds = {
            "input_ids": np.array([sum(step, [])], np.int64),
            "position_ids": np.concatenate([np.arange(n) + p for n, p in zip(lengths, past, strict=True)])[None],
            "block_table": table,
            "past_lens": past,
            "cu_seqlens": np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
            "logits_rows": np.arange(lengths.sum()),
            **caches,
        }
        (out,) = run({name: feeds[name] for name in manifest["inputs"]})
        assert out.shape == (1, lengths.sum(), manifest["vocab_size"])
        for sequence, rows in enumerate(np.split(out[0], lengths.cumsum()[:-1])):
            logits[sequence].append(rows)
        past = past + lengths.astype(np.int32)
    return [np.concatenate(rows) for rows in logits]


def expected_logits(model):
    with torch.no_grad():
        return [
            model(torch.tensor([prompt + more])).logits[0].float().numpy()
            for prompt, more in zip(PROMPTS, NEXT, strict=True)
        ]


def reference_runner(directory):
    session = evaluator(onnx.load(directory / "model.onnx"))
    return lambda feeds: session.run(["logits"], feeds)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, sparse, tmp_path):
    model = make_model(CONFIGS[name], sparse=sparse)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "onnx")

    logits = run_steps(tmp_path / "onnx", reference_runner(tmp_path / "onnx"))
    for ours, theirs in zip(logits, expected_logits(model), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())

    manifest = json.loads((tmp_path / "onnx" / "cast_onnx.json").read_text())
    ops = [node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node]
    assert manifest["pattern"] == ("2:4" if sparse else "dense")
    assert manifest["sparse_layers"] == ops.count("Sparse24MatMul")
    assert ops.count("PagedAttention") == 2
    assert (ops.count("MatMul") == 0) == sparse
    assert "GroupQueryAttention" not in ops
    assert "attention_mask" not in manifest["inputs"]
