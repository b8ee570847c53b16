"""Export to ONNX for the CPU engine: the stock model builder's graph, rewritten."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conversion.onnx.export_model import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    if name == "export":
        from conversion.onnx.export_model import export

        return export
    raise AttributeError(f"module 'conversion.onnx' has no attribute '{name}'")
