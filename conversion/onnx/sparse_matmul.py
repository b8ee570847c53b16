"""Rewrite 3: MatMul with a 2:4 weight -> cast24::Sparse24MatMul with panels."""

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from conversion.onnx.paged_attention import DOMAIN
from conversion.packed import pack24
from conversion.panel import GROUPS_PER_WORD, ROWS, to_panels

_BLOCKS = "model.layers."  # the builder's names of everything inside the transformer blocks


def use_sparse_matmul(model: ir.Model, value_dtype: torch.dtype) -> list[tuple[str, str]]:
    """Replace the MatMul of every linear in the blocks whose input size is a multiple of 8, in place.

    Panels are made when the graph is saved, one linear at a time. The operator takes over a bias added right after it.

    Args:
        model: a graph whose in-scope weights [K, N] are 2:4 along K.
        value_dtype: float32 or bfloat16, to which kept values are rounded.

    Returns:
        Names of the (values, indices) initializers of each replaced MatMul.
    """
    graph = model.graph
    replaced = []
    for node, weight in block_weights(graph):
        columns, rows = weight.shape.numpy()
        panels = _Panels(weight, value_dtype)
        values, indices = panels.initializers()
        graph.register_initializer(values)
        graph.register_initializer(indices)
        replaced.append((str(values.name), str(indices.name)))
        dtype = str(value_dtype).removeprefix("torch.")
        replace_matmul(
            graph, node, "Sparse24MatMul", [values, indices], {"N": rows, "K": columns, "value_dtype": dtype}
        )
    return replaced


def block_weights(graph: ir.Graph) -> list[tuple[ir.Node, ir.TensorProtocol]]:
    """Every MatMul inside the blocks whose input size is a multiple of 8, with its weight [K, N]."""
    found = []
    for node in graph:
        value = node.inputs[1] if node.op_type == "MatMul" else None
        weight = None if value is None else value.const_value
        if weight is not None and (weight.name or "").startswith(_BLOCKS) and weight.shape.numpy()[0] % 8 == 0:
            found.append((node, weight))
    return found


def replace_matmul(
    graph: ir.Graph, matmul: ir.Node, operator: str, weights: list[ir.Value], attributes: Mapping[str, int | str]
) -> None:
    """Put a cast24 operator in the place of `matmul`; it takes over a bias added right after it."""
    last, bias = _following_bias(matmul)
    sparse = ir.node(
        operator,
        [matmul.inputs[0], *weights, bias],
        attributes,
        domain=DOMAIN,
        name=str(matmul.name).replace("MatMul", operator),
    )
    old = [matmul] if last is matmul else [last, matmul]
    ir.convenience.replace_nodes_and_values(graph, last, old, [sparse], [last.outputs[0]], [sparse.outputs[0]])


def _following_bias(matmul: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The Add of a bias vector that alone consumes a MatMul, with the bias; else the MatMul itself and None."""
    uses = list(matmul.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        bias = uses[0].node.inputs[1 - uses[0].idx]
        if bias is not None and bias.const_value is not None and len(bias.const_value.shape) == 1:
            return uses[0].node, bias
    return matmul, None


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


def lazy(name: str, dtype: ir.DataType, shape: list[int], make: Callable[[], ir.TensorProtocol]) -> ir.Value:
    """A graph value whose tensor is made when the graph is saved."""
    tensor = ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
