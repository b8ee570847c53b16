"""The linears of a decoder graph: where they are, and the operators on panels that take their places.

Inputs of such an operator are x, its weights, bias, norm and residual; each of the last three may be absent.
"""

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from conversion.onnx.paged_attention import DOMAIN

WEIGHTS = {"Sparse24MatMul": 2, "Sparse24MatMulNBits": 1, "DenseNBits": 1}
"""The operators on panels, and how many inputs their weights are."""

BIAS, NORM, RESIDUAL = range(3)

_BLOCKS = "model.layers."  # the builder's names of everything inside the transformer blocks


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
    """Put a cast24 operator in the place of `matmul`; it takes over a bias added right after it.

    Norm and residual, of those operators that have them, are still absent (see fusion.py).
    """
    last, bias = _following_bias(matmul)
    sparse = ir.node(
        operator,
        [matmul.inputs[0], *weights, bias, *([None, None] if operator in WEIGHTS else [])],
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


def weights_of(linear: ir.Node) -> Sequence[ir.Value]:
    """The panels that an operator multiplies by."""
    return [value for value in linear.inputs[1 : 1 + WEIGHTS[linear.op_type]] if value is not None]


def place_of(linear: ir.Node, optional: int) -> int:
    """Index of the input BIAS, NORM or RESIDUAL."""
    return 1 + WEIGHTS[linear.op_type] + optional


def lazy(name: str, dtype: ir.DataType, shape: list[int], make: Callable[[], ir.TensorProtocol]) -> ir.Value:
    """A graph value whose tensor is made when the graph is saved."""
    tensor = ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
