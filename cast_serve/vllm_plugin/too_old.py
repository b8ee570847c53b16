"""What packed checkpoints get in a vLLM that the plugin was not written for."""

from typing import Any

import torch
import vllm
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from cast_serve.vllm_plugin import OLDEST_VLLM
from conversion.errors import InputError
from conversion.packed_checkpoint import QUANT_METHOD


class TooOldConfig(QuantizationConfig):
    """Refuses."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TooOldConfig":
        oldest = ".".join(map(str, OLDEST_VLLM))
        raise InputError(
            f"packed 2:4 checkpoints need vLLM {oldest} or newer, and this is {vllm.__version__}: upgrade vLLM"
        )

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        return None
