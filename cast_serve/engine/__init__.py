"""Continuous batching of one ONNX model: `Engine` loads it, `Engine.submit` generates.

Names are loaded on first use, so that `import cast_serve.engine.types` does not load ONNX Runtime.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cast_serve.engine.engine import Engine
    from cast_serve.engine.generation import EngineError, Generation

__all__ = ["Engine", "EngineError", "Generation"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from cast_serve.engine.engine import Engine

        return Engine
    if name in ("EngineError", "Generation"):
        from cast_serve.engine import generation

        return getattr(generation, name)
    raise AttributeError(f"module 'cast_serve.engine' has no attribute '{name}'")
