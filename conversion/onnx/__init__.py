"""Export to ONNX for the CPU engine: the stock model builder's graph, rewritten."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conversion.onnx.export_model import export

__all__ = ["GRAPH", "export"]

GRAPH = 4
"""Of the graphs that `export` makes. It goes up when they change: what was made before is then made anew."""


def __getattr__(name: str) -> Any:
    if name == "export":
        from conversion.onnx.export_model import export

        return export
    raise AttributeError(f"module 'conversion.onnx' has no attribute '{name}'")
