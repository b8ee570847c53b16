"""The packed 2:4 checkpoint: packing, checking, inspecting, and exporting to ONNX.

Names are loaded on first use, so that `import conversion.errors` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conversion.pack import save_packed
    from conversion.packed import pack24, unpack24
    from conversion.packed_checkpoint import load_packed
    from conversion.verification import verify

_MODULES = {
    "pack24": "conversion.packed",
    "unpack24": "conversion.packed",
    "save_packed": "conversion.pack",
    "load_packed": "conversion.packed_checkpoint",
    "verify": "conversion.verification",
}

__all__ = ["load_packed", "pack24", "save_packed", "unpack24", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'conversion' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
