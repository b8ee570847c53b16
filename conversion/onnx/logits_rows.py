"""Rewrite 2: logits of the wanted rows only."""

import onnx_ir as ir


def select_logits_rows(model: ir.Model) -> None:
    """Gather rows `logits_rows` (int64 [R], indices into T) before lm_head, so that logits are [1, R, V].

    A prompt of a thousand tokens needs the logits of its last token only.
    """
    graph = model.graph
    head = graph.outputs[0].producer()
    assert head is not None
    hidden = head.inputs[0]
    assert hidden is not None
    rows = ir.Value(name="logits_rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["R"]))
    gather = ir.node("Gather", [hidden, rows], {"axis": 1}, name="/lm_head/Gather")
    gather.outputs[0].type = hidden.type
    graph.insert_before(head, gather)
    head.replace_input_with(0, gather.outputs[0])
    graph.inputs.append(rows)
    logits = graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([1, "R", logits.shape[-1]])
