"""Operators of exported graphs in numpy, written from their definitions, for onnx's reference evaluator."""

import numpy as np
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

# What stands for an output without a name; the evaluator then hands it to every later input without one.
UNUSED = np.empty(0)


def absent(value):
    return value is None or value is UNUSED


class Sparse24MatMul(OpRun):
    """Decodes the panel layout entry by entry of its definition."""

    op_domain = "cast24"

    def _run(self, x, values, indices, bias=None, norm=None, residual=None, gated=None, **attributes):
        if not absent(norm):
            x = layer_norm(x, norm, None, attributes["epsilon"], centred=False)
        rows, columns = self.N, self.K
        group = np.arange(columns // 4)
        words = indices[:, group // 8, :]  # [P, G, 16]
        shift = (4 * (group % 8)).astype(np.uint32)[None, :, None]
        slots = [(words >> shift) & 3, (words >> (shift + np.uint32(2))) & 3]
        bf16 = self.value_dtype == "bfloat16"
        weight = np.zeros((values.shape[0], 16, columns))
        for slot, column in enumerate(slots):
            kept = values[:, :, :, slot] if bf16 else values[:, :, slot, :]  # [P, G, 16]
            np.put_along_axis(
                weight,
                (column + 4 * group[None, :, None]).transpose(0, 2, 1).astype(np.int64),
                kept.astype(np.float64).transpose(0, 2, 1),
                axis=2,
            )
        assert not weight.reshape(-1, columns)[rows:].any(), "padding rows must be zero"
        y = x.astype(np.float64) @ weight.reshape(-1, columns)[:rows].T
        if not absent(bias):
            y = y + bias
        if gated:  # sixteen of the gate, sixteen that it opens
            gate, other = np.moveaxis(y.reshape(*y.shape[:-1], -1, 2, 16), -2, 0)
            y = (gate / (1 + np.exp(-gate)) * other).reshape(*y.shape[:-1], -1)
        return ((y if absent(residual) else y + residual).astype(np.float32),)


class DenseLinear(OpRun):
    op_domain = "cast24"

    def _run(self, x, weight, bias=None, **attributes):
        y = x.astype(np.float64) @ weight.astype(np.float64).T
        return ((y if absent(bias) else y + bias).astype(np.float32),)


class PagedAttention(OpRun):
    """Writes the caches it is given in place."""

    op_domain = "cast24"

    def _run(self, query, key, value, key_cache, value_cache, table, past, cu, cos=None, sin=None, **attributes):
        heads, kv_heads = self.num_heads, self.kv_num_heads
        block_size, width = key_cache.shape[1], key_cache.shape[3]
        tokens = query.shape[1]
        if absent(key):
            query, key, value = np.split(query, [heads * width, (heads + kv_heads) * width], axis=2)
        query = query.reshape(tokens, heads, width).astype(np.float64)
        key = key.reshape(tokens, kv_heads, width).astype(np.float64)
        value = value.reshape(tokens, kv_heads, width)
        out = np.zeros((tokens, heads, width))
        for sequence in range(len(past)):
            for position, token in enumerate(range(cu[sequence], cu[sequence + 1]), start=past[sequence]):
                block, offset = table[sequence, position // block_size], position % block_size
                k = rotate(key[token], cos[position], sin[position]) if self.do_rotary else key[token]
                q = rotate(query[token], cos[position], sin[position]) if self.do_rotary else query[token]
                key_cache[block, offset], value_cache[block, offset] = k, value[token]
                window = self.local_window_size
                first = 0 if window < 0 else max(0, position + 1 - window)
                seen = [(table[sequence, p // block_size], p % block_size) for p in range(first, position + 1)]
                for head in range(heads):
                    keys = np.array([key_cache[b, o, head * kv_heads // heads] for b, o in seen], np.float64)
                    values = np.array([value_cache[b, o, head * kv_heads // heads] for b, o in seen], np.float64)
                    scores = keys @ q[head] * self.scale
                    weights = np.exp(scores - scores.max())
                    out[token, head] = weights @ values / weights.sum()
        return (out.reshape(1, tokens, heads * width).astype(np.float32),)


def rotate(x, cos, sin):
    """Rotary embedding of [heads, width], halves not interleaved."""
    left, right = np.split(x, 2, axis=1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=1)


def layer_norm(x, weight, bias, epsilon, centred):
    x = x.astype(np.float64)
    if centred:
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight
    return (y if absent(bias) else y + bias).astype(np.float32)


class SimplifiedLayerNormalization(OpRun):
    op_domain = ""

    def _run(self, x, weight, **attributes):
        return (layer_norm(x, weight, None, self.epsilon, centred=False),)


class SkipSimplifiedLayerNormalization(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, skip, weight, **attributes):
        total = x + skip
        return self.outputs(layer_norm(total, weight, None, self.epsilon, centred=False), total)

    def outputs(self, normed, total):
        return (normed, UNUSED, UNUSED, total)[: len(self.onnx_node.output)]


class SkipLayerNormalization(SkipSimplifiedLayerNormalization):
    op_domain = "com.microsoft"

    def _run(self, x, skip, weight, bias, **attributes):
        total = x + skip
        return self.outputs(layer_norm(total, weight, bias, self.epsilon, centred=True), total)


OPS = [
    Sparse24MatMul,
    DenseLinear,
    PagedAttention,
    SimplifiedLayerNormalization,
    SkipSimplifiedLayerNormalization,
    SkipLayerNormalization,
]


def evaluator(model):
    """A reference evaluator for an exported model."""
    return ReferenceEvaluator(model, new_ops=OPS)
