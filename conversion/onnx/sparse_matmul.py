"""Rewrite 3: MatMul with a 2:4 weight -> cast24::Sparse24MatMul with panels."""

import onnx_ir as ir
import torch
from torch import Tensor

from conversion.onnx.linear import block_weights, lazy, replace_matmul
from conversion.packed import pack24
from conversion.panel import GROUPS_PER_WORD, ROWS, to_panels


def use_sparse_matmul(model: ir.Model, value_dtype: torch.dtype) -> None:
    """Replace the MatMul of every linear in the blocks whose input size is a multiple of 8, in place.

    Panels are made when the graph is saved, one linear at a time. The operator takes over a bias added right after it.

    Args:
        model: a graph whose in-scope weights [K, N] are 2:4 along K.
        value_dtype: float32 or bfloat16, to which kept values are rounded.
    """
    graph = model.graph
    for node, weight in block_weights(graph):
        columns, rows = weight.shape.numpy()
        panels = _Panels(weight, value_dtype)
        values, indices = panels.initializers()
        graph.register_initializer(values)
        graph.register_initializer(indices)
        dtype = str(value_dtype).removeprefix("torch.")
        replace_matmul(
            graph, node, "Sparse24MatMul", [values, indices], {"N": rows, "K": columns, "value_dtype": dtype}
        )


class _Panels:
    """Packs a weight when its values are asked for, and keeps its indices until they are asked for too."""

    def __init__(self, weight: ir.TensorProtocol, dtype: torch.dtype) -> None:
        self._weight = weight
        self._dtype = dtype
        self._made: Tensor | None = None

    def initializers(self) -> tuple[ir.Value, ir.Value]:
        """Graph values of the panels' values and indices, still to be made."""
        columns, rows = self._weight.shape.numpy()
        panels, groups = -(-rows // ROWS), columns // 4
        words = -(-groups // GROUPS_PER_WORD)
        layout = [panels, groups, 2, ROWS] if self._dtype == torch.float32 else [panels, groups, ROWS, 2]
        value_type = ir.DataType.FLOAT if self._dtype == torch.float32 else ir.DataType.BFLOAT16
        base = str(self._weight.name).removesuffix("MatMul.weight")
        return (
            lazy(f"{base}values", value_type, layout, self._values),
            lazy(f"{base}indices", ir.DataType.UINT32, [panels, words, ROWS], self._indices),
        )

    def _pack(self) -> tuple[Tensor, Tensor]:
        values, bitmask = pack24(torch.from_numpy(self._weight.numpy()).T)
        return to_panels(values.to(self._dtype), bitmask)

    def _values(self) -> ir.TensorProtocol:
        values, self._made = self._pack()
        return ir.tensor(values)

    def _indices(self) -> ir.TensorProtocol:
        indices, self._made = self._pack()[1] if self._made is None else self._made, None
        return ir.tensor(indices.numpy())
