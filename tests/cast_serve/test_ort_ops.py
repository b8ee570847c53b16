"""The ONNX Runtime custom ops against float64 numpy, for every instruction set that this CPU has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from ml_dtypes import bfloat16
from onnx import TensorProto, helper

from cast_serve import kernels
from cast_serve.engine.library import executed
from cast_serve.kernels import library_path, prepack_quantized
from tests.cast_serve.test_quantized_kernels import FORMATS, quantized_layer

ELEMENT_TYPES = {
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "uint32": TensorProto.UINT32,
}


def op_session(
    op: str, inputs: Mapping[str, np.ndarray | None], constants: Sequence[Any] = (), **attributes: Any
) -> ort.InferenceSession:
    """A graph of one node; inputs in the op's order, None for a constant, or (blank name) nothing."""
    node = helper.make_node(op, [name.strip() for name in inputs], ["y"], domain="cast24", **attributes)
    values = [
        helper.make_tensor_value_info(name, ELEMENT_TYPES[array.dtype.name], None)
        for name, array in inputs.items()
        if array is not None
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", values, [output], initializer=list(constants))
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("cast24", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bf16_bits(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bf16_constant(name: str, array: np.ndarray) -> Any:
    bits = bf16_bits(array)
    return helper.make_tensor(name, TensorProto.BFLOAT16, bits.shape, bits.tobytes(), raw=True)


def random_24(rng: np.random.Generator, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A 2:4 weight [n, k] whose values are exact in bf16, its kept values [n, k/4, 2] and their columns."""
    columns = np.sort(np.argsort(rng.random((n, k // 4, 4)), axis=-1)[..., :2], axis=-1)
    values = (rng.integers(-128, 128, (n, k // 4, 2)) / 64).astype(np.float32)
    weight = np.zeros((n, k // 4, 4), np.float32)
    np.put_along_axis(weight, columns, values, axis=-1)
    return weight.reshape(n, k), values, columns


def panels(values: np.ndarray, columns: np.ndarray, bf16: bool) -> tuple[np.ndarray, np.ndarray]:
    """The panel layout written out element by element from its definition."""
    n, groups, _ = values.shape
    count = -(-n // 16)
    out = np.zeros((count, groups, 16, 2) if bf16 else (count, groups, 2, 16), np.float32)
    indices = np.full((count, -(-groups // 8), 16), 0x44444444, np.uint32)
    for row in range(n):
        p, lane = divmod(row, 16)
        for g in range(groups):
            for slot in range(2):
                at = (p, g, lane, slot) if bf16 else (p, g, slot, lane)
                out[at] = values[row, g, slot]
            code = int(columns[row, g, 0]) | int(columns[row, g, 1]) << 2
            shift = 4 * (g % 8)
            indices[p, g // 8, lane] = (int(indices[p, g // 8, lane]) & ~(15 << shift) & 0xFFFFFFFF) | code << shift
    return out, indices


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 1), (3, 40, 33), (17, 72, 48)])
def test_sparse24_matmul_is_the_dense_product(isa: str, m: int, k: int, n: int, value_dtype: str) -> None:
    rng = np.random.default_rng(m * n)
    weight, values, columns = random_24(rng, n, k)
    x, bias = rng.standard_normal((1, m, k), np.float32), rng.standard_normal(n, np.float32)
    panel_values, indices = panels(values, columns, value_dtype == "bfloat16")
    feeds: dict[str, np.ndarray | None] = {"x": x, "values": panel_values, "indices": indices, "bias": bias}
    constants = []
    if value_dtype == "bfloat16":
        constants.append(bf16_constant("values", panel_values))
        feeds["values"] = None
    session = op_session("Sparse24MatMul", feeds, constants, N=n, K=k, value_dtype=value_dtype)
    y = session.run(None, {name: array for name, array in feeds.items() if array is not None})[0]
    assert y.shape == (1, m, n)
    if value_dtype == "bfloat16" and isa == "avx512bf16":  # inputs are rounded to bf16 for bf16 weights
        x = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T.astype(np.float64) + bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 7, 1), (3, 40, 33), (17, 75, 50)])
def test_dense_linear(isa: str, m: int, k: int, n: int, bf16: bool) -> None:
    rng = np.random.default_rng(m * n)
    weight = (rng.integers(-128, 128, (n, k)) / 64).astype(np.float32)
    x = rng.standard_normal((m, k), np.float32)
    feeds: dict[str, np.ndarray | None] = {"x": x, "weight": None if bf16 else weight}
    session = op_session("DenseLinear", feeds, [bf16_constant("weight", weight)] if bf16 else [])
    y = session.run(None, {name: array for name, array in feeds.items() if array is not None})[0]
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=0, atol=1e-4)


def quantized(rng: np.random.Generator, n: int, k: int, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Panels of a dense weight [n, k], written out element by element from their definition, and the weight."""
    codes = rng.integers(-(1 << bits - 1) + 1, 1 << bits - 1, (n, k))
    scale = rng.random((n, -(-k // group)), np.float32) + np.float32(0.1)
    panels = []
    for first in range(0, n, 16):
        panel = b""
        for g, begin in enumerate(range(0, k, group)):
            block = np.zeros((16, group), np.int64)
            part = codes[first : first + 16, begin : begin + group]
            block[: len(part), : part.shape[1]] = part
            scales = np.zeros(16, np.float32)
            scales[: len(part)] = scale[first : first + 16, g]
            panel += scales.tobytes() + block.sum(1).astype(np.int16).tobytes()
            for word in range(begin, min(begin + group, -(-k // 32) * 32), 32):
                fours = block[:, word - begin : word - begin + 32].reshape(16, 8, 4).transpose(1, 0, 2)
                if bits == 4:
                    fours = fours[0::2] & 15 | (fours[1::2] & 15) << 4
                panel += fours.astype(np.uint8).tobytes()
        panels.append(np.frombuffer(panel, np.uint8))
    return np.stack(panels), codes * np.repeat(scale.astype(np.float64), group, axis=1)[:, :k]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 1), (3, 40, 33), (17, 200, 50)])
def test_dense_nbits_and_its_embedding(isa: str, m: int, k: int, n: int, bits: int) -> None:
    rng = np.random.default_rng(m * n)
    panels, weight = quantized(rng, n, k, bits, 64)
    x, bias = rng.standard_normal((1, m, k), np.float32), rng.standard_normal(n, np.float32)
    feeds = {"x": x, "panels": panels, "bias": bias}
    attributes = {"N": n, "K": k, "bits": bits, "group_size": 64}
    exact = x.astype(np.float64) @ weight.T + bias
    y = op_session("DenseNBits", feeds, **attributes, float_activations=1).run(None, feeds)[0]
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-3)
    rounded = op_session("DenseNBits", feeds, **attributes).run(None, feeds)[0]
    assert 1e-5 * np.abs(exact).max() < np.abs(rounded - exact).max() < 0.03 * np.abs(exact).max() + 1e-3
    ids = rng.integers(0, n, (2, 3))
    found = op_session("EmbeddingNBits", {"ids": ids, "panels": panels}, **attributes).run(
        None, {"ids": ids, "panels": panels}
    )[0]
    np.testing.assert_allclose(found, weight[ids], rtol=1e-6)
    with pytest.raises(Exception, match=f"id {n} is outside the {n} rows"):
        op_session("EmbeddingNBits", {"ids": ids, "panels": panels}, **attributes).run(
            None, {"ids": ids + n - ids, "panels": panels}
        )


def test_sparse24_matmul_nbits_is_the_kernel() -> None:
    for quantization in FORMATS:
        stored, bitmask, scale, _ = quantized_layer(40, 288, quantization, sparse=True)
        panels, bits, group = prepack_quantized(stored, bitmask, scale, quantization.group_size)
        x = torch.randn(5, 288)
        feeds = {"x": x.numpy(), "panels": panels.numpy()}
        for exact in (0, 1):
            session = op_session(
                "Sparse24MatMulNBits", feeds, N=40, K=288, bits=bits, group_size=group, float_activations=exact
            )
            expected = torch.ops.cast24.linear_quantized(x, panels, 40, bits, True, group, bool(exact))
            assert np.array_equal(session.run(None, feeds)[0], expected.numpy())


def fused(x: np.ndarray, weight: np.ndarray, norm: np.ndarray, epsilon: float, residual: np.ndarray) -> np.ndarray:
    """silu(gate) * other + residual of a normed x, gate and other being 16 rows each in turn."""
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + epsilon) * norm
    sums = (normed @ weight.T).reshape(*x.shape[:-1], -1, 2, 16)
    gate, other = sums[..., 0, :], sums[..., 1, :]
    return (gate * np.exp(-np.logaddexp(0, -gate)) * other).reshape(*x.shape[:-1], -1) + residual


@pytest.mark.parametrize("m", [1, 5, 70, 230])
@pytest.mark.parametrize("op", ["Sparse24MatMul", "Sparse24MatMulNBits", "DenseNBits"])
def test_steps_around_a_product_are_done_in_it(isa: str, op: str, m: int) -> None:
    rng = np.random.default_rng(m)
    n, k, epsilon = 96, 72, 0.1
    attributes: dict[str, Any] = {"N": n, "K": k}
    weights: dict[str, np.ndarray | None]
    if op == "Sparse24MatMul":
        weight, values, columns = random_24(rng, n, k)
        weights = dict(zip(("values", "indices"), panels(values, columns, bf16=False), strict=True))
    elif op == "DenseNBits":
        quantized_panels, weight = quantized(rng, n, k, 8, 32)
        weights = {"panels": quantized_panels}
        attributes |= {"bits": 8, "group_size": 32}
    else:
        stored, bitmask, scale, dense = quantized_layer(n, k, FORMATS[0], sparse=True)
        packed, bits, group = prepack_quantized(stored, bitmask, scale, FORMATS[0].group_size)
        weight, weights = dense.numpy(), {"panels": packed.numpy()}
        attributes |= {"bits": bits, "group_size": group}
    if op != "Sparse24MatMul":
        attributes["float_activations"] = 1
    x, norm = rng.standard_normal((1, m, k), np.float32), rng.standard_normal(k, np.float32)
    residual = rng.standard_normal((1, m, n // 2), np.float32)
    feeds = {"x": x, **weights, "": None, "norm": norm, "residual": residual}
    given = {name: array for name, array in feeds.items() if array is not None}
    session = op_session(op, feeds, **attributes, gated=1, epsilon=epsilon)
    expected = fused(x, weight, norm, epsilon, residual)
    np.testing.assert_allclose(session.run(None, given)[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    plain = op_session(op, {"x": x, **weights, "": None, " ": None, "residual": residual}, **attributes)
    with pytest.raises(Exception, match=rf"residual has shape \[1, {m}, 48\], expected \[1, {m}, 96\]"):
        plain.run(None, {name: array for name, array in given.items() if name != "norm"})
    with pytest.raises(Exception, match="multiple of 32"):
        op_session(op, feeds, **{**attributes, "N": 80}, gated=1)


def test_wrong_shapes_are_named() -> None:
    x = np.zeros((1, 3, 40), np.float32)
    values, indices = np.zeros((1, 10, 2, 16), np.float32), np.zeros((1, 2, 16), np.uint32)
    feeds = {"x": x, "values": values, "indices": indices}
    session = op_session("Sparse24MatMul", feeds, N=16, K=40)
    session.run(None, feeds)
    with pytest.raises(Exception, match=r"Sparse24MatMul: x has shape \[1, 3, 32\], expected \[..., 40\]"):
        session.run(None, {**feeds, "x": x[..., :32].copy()})
    with pytest.raises(Exception, match=r"indices has shape \[1, 1, 16\], expected \[1, 2, 16\]"):
        session.run(None, {**feeds, "indices": indices[:, :1].copy()})
    with pytest.raises(Exception, match="K a positive multiple of 8"):
        op_session("Sparse24MatMul", feeds, N=16, K=44)


def test_executed_counts_live_nodes_that_ran() -> None:
    x, weight = np.ones((2, 8), np.float32), np.ones((4, 8), np.float32)
    before, bytes_before = executed("DenseLinear")
    session = op_session("DenseLinear", {"x": x, "weight": weight})
    assert executed("DenseLinear") == (before, bytes_before)
    for _ in range(2):
        session.run(None, {"x": x, "weight": weight})
        assert executed("DenseLinear") == (before + 1, bytes_before + weight.nbytes)
    del session
    assert executed("DenseLinear") == (before, bytes_before)


def ort_value(array: np.ndarray) -> ort.OrtValue:
    """On the array's own memory."""
    stored = array.view(np.uint16) if array.dtype == bfloat16 else array
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(stored, ELEMENT_TYPES[array.dtype.name])


@dataclass
class Attention:
    """One PagedAttention node with its caches, fed ragged chunks, and a naive float64 twin fed the same."""

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 24
    block_size: int = 16
    blocks: int = 200
    window: int = -1
    softcap: float = 0.0
    rotary_dim: int = 16
    interleaved: bool = False
    packed: bool = True
    positions: int = 2048
    cache: type = np.float32
    past: dict[int, int] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)
        shape = (self.blocks, self.block_size, self.kv_heads, self.head_dim)
        # What was in the cache before must not matter, NaN included.
        self.key_cache, self.value_cache = np.full((2, *shape), np.nan).astype(self.cache)
        self.free = list(rng.permutation(self.blocks))
        angles = np.arange(self.positions)[:, None] / 100 ** (np.arange(self.rotary_dim // 2) / 8)[None]
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.session: ort.InferenceSession | None = None

    def step(self, chunks: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[int, np.ndarray]:
        """Feed each sequence its new (q [n, heads, D], k, v [n, kv_heads, D]); returns its rows of the output."""
        for b, (q, _, _) in chunks.items():
            table, length = self.tables.setdefault(b, []), self.past.setdefault(b, 0) + len(q)
            while len(table) * self.block_size < length:
                table.append(int(self.free.pop()))
        width = max(len(self.tables[b]) for b in chunks)
        parts = [
            np.concatenate([chunk[i].reshape(len(chunk[i]), -1) for chunk in chunks.values()])[None] for i in range(3)
        ]
        feeds = {"query": np.concatenate(parts, axis=-1)} if self.packed else dict(zip("qkv", parts, strict=True))
        rest = {
            "key_cache": self.key_cache,
            "value_cache": self.value_cache,
            "block_table": np.array([self.tables[b] + [0] * (width - len(self.tables[b])) for b in chunks], np.int32),
            "past_lens": np.array([self.past[b] for b in chunks], np.int32),
            "cu_seqlens": np.cumsum([0, *(len(c[0]) for c in chunks.values())]).astype(np.int32),
        }
        if self.rotary_dim:
            rest |= {"cos": self.cos, "sin": self.sin}
        if self.session is None:
            absent: dict[str, None] = {"": None, " ": None} if self.packed else {}
            self.session = self._session({**feeds, **absent, **rest})
        given = {name: ort_value(array) for name, array in (feeds | rest).items()}
        out = self.session.run_with_ort_values(None, given)[0].numpy()[0]
        starts = rest["cu_seqlens"]
        rows = {b: out[starts[i] : starts[i + 1]].reshape(-1, self.heads, self.head_dim) for i, b in enumerate(chunks)}
        for b, (q, _, _) in chunks.items():
            self.past[b] += len(q)
        return rows

    def _session(self, inputs: Mapping[str, np.ndarray | None]) -> ort.InferenceSession:
        return op_session(
            "PagedAttention",
            inputs,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            scale=0.3,
            do_rotary=int(self.rotary_dim > 0),
            rotary_interleaved=int(self.interleaved),
            local_window_size=self.window,
            softcap=self.softcap,
        )

    def random(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        q = 2 * rng.standard_normal((n, self.heads, self.head_dim), np.float32)
        k, v = rng.standard_normal((2, n, self.kv_heads, self.head_dim), np.float32)
        return q, k, v

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64).copy()
        half = self.rotary_dim // 2
        first = slice(0, self.rotary_dim, 2) if self.interleaved else slice(0, half)
        second = slice(1, self.rotary_dim, 2) if self.interleaved else slice(half, self.rotary_dim)
        cos, sin = self.cos[: len(x), None].astype(np.float64), self.sin[: len(x), None].astype(np.float64)
        a, b = x[..., first].copy(), x[..., second].copy()
        x[..., first], x[..., second] = a * cos - b * sin, b * cos + a * sin
        return x

    def naive(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Attention of a whole sequence [n, heads, D] from position 0, in float64, over what the cache holds of it."""
        if self.rotary_dim:
            q, k = self._rotate(q), self._rotate(k)
        k, v = k.astype(self.cache), v.astype(self.cache)
        group = self.heads // self.kv_heads
        keys, values = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
        scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), keys) * 0.3
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        distance = np.arange(len(q))[:, None] - np.arange(len(q))[None]
        hidden = (distance < 0) | ((distance >= self.window) if self.window > 0 else False)
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), values)


SHAPES = {
    "gqa": {},
    "one kv head, odd head_dim, whole rotary": {"heads": 5, "kv_heads": 1, "head_dim": 20, "rotary_dim": 20},
    "no rotary, separate inputs, wide heads": {
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 128,
        "rotary_dim": 0,
        "packed": False,
    },
    "interleaved rotary, blocks of 32": {"interleaved": True, "block_size": 32},
    "window": {"window": 9},
    "window longer than a block": {"window": 40, "packed": False},
    "softcap": {"softcap": 5.0},
    "bf16 cache": {"cache": bfloat16},
    "bf16 cache, no rotary": {"cache": bfloat16, "rotary_dim": 0},
    "bf16 cache, odd head_dim": {
        "cache": bfloat16,
        "heads": 5,
        "kv_heads": 1,
        "head_dim": 21,
        "rotary_dim": 0,
    },
    "bf16 cache, window": {"cache": bfloat16, "window": 9, "packed": False, "rotary_dim": 0},
}


def tolerance(attention: Attention) -> float:
    """Rotating in float32 instead of float64 moves keys that lie between two bf16 to the other one."""
    return 2e-3 if attention.cache is bfloat16 and attention.rotary_dim else 2e-5


def take(part: tuple[np.ndarray, ...], begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k, v = (x[begin:end] for x in part)
    return q, k, v


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ragged_batch_is_naive_attention(isa: str, shape: dict[str, Any]) -> None:
    attention = Attention(**shape)
    # Lengths at and around block and tile boundaries; the chunks below mix prefill and decode.
    whole = {b: attention.random(n, b) for b, n in enumerate((1, 15, 16, 17, 33, 70))}
    done = dict.fromkeys(whole, 0)
    outputs: dict[int, list[np.ndarray]] = {b: [] for b in whole}
    for step in range(40):
        chunks = {}
        for b, part in whole.items():
            n = (1, 16, 3, 19, 1)[(step + b) % 5]
            if done[b] < len(part[0]) and (step + b) % 3:
                chunks[b] = take(part, done[b], done[b] + n)
                done[b] += len(chunks[b][0])
        if chunks:
            for b, rows in attention.step(chunks).items():
                outputs[b].append(rows)
    for b, part in whole.items():
        np.testing.assert_allclose(
            np.concatenate(outputs[b]), attention.naive(*part), rtol=0, atol=tolerance(attention)
        )


def test_a_bf16_cache_keeps_what_is_not_a_number(isa: str) -> None:
    attention = Attention(cache=bfloat16, rotary_dim=0)
    q, k, v = attention.random(1, 0)
    v[0, 0, :2] = np.array([0x7F800001, 0x7F800000], np.uint32).view(np.float32)  # the first is no infinity either
    rows = attention.step({0: (q, k, v)})[0]
    assert np.isnan(rows[0, 0, 0])
    assert np.isposinf(rows[0, 0, 1])
    assert np.isfinite(rows[0, 0, 2:]).all()


@pytest.mark.parametrize("window", [-1, 600])
def test_a_key_or_query_that_is_not_a_number_spoils_what_sees_it(isa: str, window: int) -> None:
    n = 1300
    attention = Attention(rotary_dim=0, window=window)
    q, k, v = attention.random(n, 0)
    k[3, :, 0] = np.nan
    q[1, 0, 0] = np.nan
    expected = attention.naive(q, k, v)
    assert np.isnan(expected[[1, 3, 600]]).any(axis=(1, 2)).all()
    rows = attention.step({0: (q, k, v)})[0]
    np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize(
    "shape", [{}, {"window": 600}, {"cache": bfloat16, "rotary_dim": 0}], ids=["all", "window", "bf16 cache"]
)
def test_long_sequence_spread_over_threads(isa: str, shape: dict[str, Any]) -> None:
    n = 1300  # three segments, which decode folds together
    attention = Attention(**shape)
    part = attention.random(n, 0)
    expected = attention.naive(*part)
    rows = attention.step({0: take(part, 0, n - 3)})[0]
    np.testing.assert_allclose(rows, expected[: n - 3], rtol=0, atol=2e-5)
    for t in range(n - 3, n):
        rows = attention.step({0: take(part, t, t + 1)})[0]
        np.testing.assert_allclose(rows, expected[t : t + 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("cache", [np.float32, bfloat16])
def test_bits_depend_on_neither_batch_nor_chunks(isa: str, cache: type) -> None:
    n = 1100
    part = Attention().random(n, 0)
    alone = Attention(cache=cache).step({0: part})[0]

    attention = Attention(cache=cache)
    others = {b: attention.random(n, b) for b in (1, 2)}
    rows, done, step = [], 0, 0
    while done < n:
        size = (1, 4, 130, 37)[step % 4]
        chunks = {b: take(other, step * 2, step * 2 + 1 + b) for b, other in others.items()}
        done_now = min(n, done + size)
        rows.append(attention.step({1: chunks[1], 0: take(part, done, done_now), 2: chunks[2]})[0])
        done, step = done_now, step + 1
    assert np.array_equal(np.concatenate(rows), alone)


def test_every_avx512_level_has_the_same_attention(isa: str) -> None:
    """Its extensions add nothing to attention, which must not fall back to narrower vectors for them."""
    if not isa.startswith("avx512"):
        pytest.skip("not a level of AVX-512")
    part = Attention().random(300, 0)
    rows = Attention().step({0: part})[0]
    kernels.set_isa("avx512")
    assert np.array_equal(Attention().step({0: part})[0], rows)
    kernels.set_isa("portable")
    assert not np.array_equal(Attention().step({0: part})[0], rows)


def test_attention_refuses_what_would_leave_the_cache() -> None:
    attention = Attention(blocks=4, positions=40)
    attention.step({0: attention.random(10, 0)})
    with pytest.raises(Exception, match="longer than cos_cache"):
        attention.step({0: attention.random(31, 0)})
    attention.tables[0][0] = 4
    with pytest.raises(Exception, match="block_table names block 4 of 4"):
        attention.step({0: attention.random(1, 0)})


def test_attention_refuses_caches_of_other_types() -> None:
    attention = Attention(cache=np.float64)
    with pytest.raises(Exception, match="key_cache has element type 11"):
        attention.step({0: attention.random(1, 0)})
    attention = Attention(cache=bfloat16)
    attention.value_cache = attention.value_cache.astype(np.float32)
    with pytest.raises(Exception, match="value_cache has element type 1 of ONNX, expected 16"):
        attention.step({0: attention.random(1, 0)})
