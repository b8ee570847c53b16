"""Serving 2:4 models: on ONNX Runtime (`cast serve`), and as transformers models in plain Python (`load`).

`load` is imported on first use: `import cast_serve` needs no torch, nor does the ONNX Runtime path.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cast_serve.torch_model.load import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from cast_serve.torch_model.load import load

        return load
    raise AttributeError(f"module 'cast_serve' has no attribute '{name}'")
