"""Which of vLLM's layers are packed, and what their values are: the "quantization" method cast24."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from cast_serve.vllm_plugin.load_report import LoadReport
from conversion.errors import InputError
from conversion.families import Family, family_of, place_in_blocks
from conversion.packed_checkpoint import QUANT_METHOD, PackedCheckpoint, PackedFormat

LAYOUT = 1
"""Of the weights as the compiled graph sees them; goes up when the operators' arguments change."""


class Cast24Config(QuantizationConfig):
    """A packed checkpoint's format, and how its layers run.

    Attributes:
        format: what config.json says of the values.
        float_activations: multiply quantized weights by activations as they are, instead of rounded to 8 bits; asked
            for by `--hf-overrides '{"cast24_float_activations": true}'`.
        report: what the packed layers of this process weigh.
    """

    def __init__(self, packed_format: PackedFormat) -> None:
        super().__init__()
        self.format = packed_format
        self.float_activations = False
        self.report = LoadReport()
        self._family: Family | None = None

    def __repr__(self) -> str:
        return f"Cast24Config({self.format}, float_activations={self.float_activations})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the first GPUs with sparse tensor cores

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Cast24Config":
        return cls(PackedFormat.of_config(config, "the model"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: PreTrainedConfig | None = None
    ) -> str | None:
        """Claim nothing: the method's name in config.json does.

        vLLM's key of compiled graphs holds the model's config, but nothing of a plugin. So the release and its layout
        are noted in there, here, where vLLM first shows it.
        """
        if hf_quant_cfg.get("quant_method") == QUANT_METHOD and isinstance(
            noted := getattr(hf_config, "quantization_config", None), dict
        ):
            noted["made_for"] = f"cast-serve {version('cast-serve')}, layout {LAYOUT}"
        return None

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Check the checkpoint's headers and bitmasks before any worker starts, so that damage is one sentence."""
        if hf_config is not None:
            self._family = family_of(hf_config.model_type)
            self.float_activations = getattr(hf_config, "cast24_float_activations", False)
        if Path(model_name).is_dir():
            PackedCheckpoint(model_name).check_bitmasks()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            if self._is_dense(prefix):
                return UnquantizedLinearMethod()
            _check_supported()
            from cast_serve.vllm_plugin.linear import SparseLinearMethod

            return SparseLinearMethod(self, prefix)
        if isinstance(layer, VocabParallelEmbedding) and self.format.embedding is not None:
            _check_supported()
            from cast_serve.vllm_plugin.embedding import QuantizedEmbeddingMethod

            return QuantizedEmbeddingMethod(self, self.format.embedding, prefix)
        return None

    def _is_dense(self, prefix: str) -> bool:
        """Tell whether the checkpoint holds the layer dense; of a fused layer ('qkv_proj'), its parts."""
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return any(self._place(f"{parent}.{part}") in map(self._place, self.format.ignore) for part in parts)

    def _place(self, name: str) -> str:
        return name if self._family is None else place_in_blocks(self._family, name)


def _check_supported() -> None:
    """InputError if packed layers cannot run as vLLM was told to run them."""
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise InputError(
            f"the vLLM plugin has no 2:4 kernels for {current_platform.device_name}: serve packed checkpoints on a CPU "
            "or an NVIDIA GPU"
        )
    if get_current_vllm_config().lora_config is not None:
        raise InputError(
            "LoRA adapters do not run on 2:4 layers: leave --enable-lora out, or fold the adapter in with "
            "'cast train --finetune --lora-rank'"
        )
