"""Rewrite 5: what stands between the linears of a Llama-like block moves into cast24's operators.

Of ten nodes a block five are left. Each one less saves waking the threads, and a way of the activations through memory.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from conversion.onnx.linear import BIAS, NORM, RESIDUAL, WEIGHTS, lazy, place_of, weights_of
from conversion.panel import ROWS


def fuse_steps(model: ir.Model) -> None:
    """Move SiLU gates, residual sums and RMS norms into the linears beside them, in place.

    Other activations and norms (GPT-2's, OPT's) stay, and so does whatever more than linears read.
    """
    for node in list(model.graph):
        _fuse_gate(model.graph, node)
    for node in list(model.graph):
        _fuse_residual(model.graph, node)
    for node in list(model.graph):
        _fuse_norm(model.graph, node)


def _fuse_gate(graph: ir.Graph, product: ir.Node) -> None:
    """silu(gate(x)) * up(x) -> one linear, whose panels are gate's and up's in turn."""
    found = _gate_steps(product)
    if found is None:
        return
    silu, sigmoid, gate, up = found
    weights = []
    for of_gate, of_up in zip(weights_of(gate), weights_of(up), strict=True):
        merged = _interleaved(of_gate, of_up)
        graph.register_initializer(merged)
        weights.append(merged)
    attributes = _attributes(gate)
    fused = ir.node(
        gate.op_type,
        [gate.inputs[0], *weights, None, None, None],
        {**attributes, "N": 2 * attributes["N"], "gated": 1},
        domain=gate.domain,
        name=str(gate.name).replace("gate_proj", "gate_up_proj"),
    )
    old = [product, silu, sigmoid, up, gate]
    ir.convenience.replace_nodes_and_values(graph, product, old, [fused], [product.outputs[0]], [fused.outputs[0]])
    for linear in (gate, up):
        for weight in weights_of(linear):
            del graph.initializers[str(weight.name)]


def _gate_steps(product: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node, ir.Node] | None:
    """Of product = silu * up, where silu = gate * sigmoid: silu, sigmoid, gate, up, if gate and up are like linears."""
    silu, up = (_producer(value) for value in product.inputs[:2]) if product.op_type == "Mul" else (None, None)
    if silu is None or up is None or silu.op_type != "Mul":
        return None
    gate, sigmoid = (_producer(value) for value in silu.inputs)
    if gate is None or sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.inputs[0] is not silu.inputs[0]:
        return None
    if gate.op_type not in WEIGHTS or gate.op_type != up.op_type or gate.inputs[0] is not up.inputs[0]:
        return None
    if _attributes(gate) != _attributes(up) or _attributes(gate)["N"] % ROWS or _given(gate, BIAS) or _given(up, BIAS):
        return None
    readers = {silu: 1, sigmoid: 1, up: 1, gate: 2}
    alone = all(len(node.outputs[0].uses()) == count for node, count in readers.items())
    return (silu, sigmoid, gate, up) if alone else None


def _interleaved(gate: ir.Value, up: ir.Value) -> ir.Value:
    """Panels [P, ...] of two weights -> [2 P, ...], one of each in turn, made when the graph is saved."""
    of_gate, of_up = gate.const_value, up.const_value
    assert of_gate is not None
    assert of_up is not None
    shape = list(of_gate.shape.numpy())
    name = str(gate.name).replace("gate_proj", "gate_up_proj")

    def make() -> ir.TensorProtocol:
        return ir.tensor(np.stack([of_gate.numpy(), of_up.numpy()], 1).reshape(2 * shape[0], *shape[1:]))

    return lazy(name, of_gate.dtype, [2 * shape[0], *shape[1:]], make)


def _fuse_residual(graph: ir.Graph, norm: ir.Node) -> None:
    """norm(x + linear(y)) -> norm(linear(y) + x): the linear adds what it is added to."""
    if norm.op_type != "SkipSimplifiedLayerNormalization":
        return
    for linear_index in (1, 0):
        total, other = norm.inputs[linear_index], norm.inputs[1 - linear_index]
        linear = _producer(total)
        if linear is None or linear.op_type not in WEIGHTS or len(linear.outputs[0].uses()) != 1:
            continue
        if _given(linear, RESIDUAL) or "gated" in linear.attributes:
            continue
        linear.replace_input_with(place_of(linear, RESIDUAL), other)
        plain = ir.node(
            "SimplifiedLayerNormalization",
            [total, norm.inputs[2]],
            {"epsilon": norm.attributes["epsilon"].value, "axis": -1, "stash_type": 1},
            name=str(norm.name),
        )
        assert total is not None
        old, new = [norm.outputs[0]], [plain.outputs[0]]
        if len(norm.outputs) > 3:
            old, new = [norm.outputs[0], norm.outputs[3]], [plain.outputs[0], total]
        ir.convenience.replace_nodes_and_values(graph, norm, [norm], [plain], old, new)
        return


def _fuse_norm(graph: ir.Graph, norm: ir.Node) -> None:
    """linear(norm(x)) -> the linear norms x itself, if linears are all that reads the norm."""
    if norm.op_type != "SimplifiedLayerNormalization":
        return
    readers = [use.node for use in norm.outputs[0].uses() if use.idx == 0]
    if len(readers) < len(norm.outputs[0].uses()) or any(node.op_type not in WEIGHTS for node in readers):
        return
    for linear in readers:
        linear.replace_input_with(0, norm.inputs[0])
        linear.replace_input_with(place_of(linear, NORM), norm.inputs[1])
        linear.attributes["epsilon"] = norm.attributes["epsilon"]
    graph.remove(norm, safe=True)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _given(linear: ir.Node, optional: int) -> bool:
    return linear.inputs[place_of(linear, optional)] is not None


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
