"""Packed 2:4 checkpoints in stock vLLM: `vllm serve DIR` and `LLM(DIR)`, nothing else to say.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its processes, for
any model. So it imports little and never fails: what stands in the way of a packed checkpoint is said when one is
loaded. See docs/vllm.md.
"""

OLDEST_VLLM = (0, 31)


def register() -> None:
    """Tell vLLM about the quantization method "cast24". May be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.version import __version_tuple__

    from cast_serve.vllm_plugin.refusal import show_refusals_plainly
    from conversion.packed_checkpoint import QUANT_METHOD

    show_refusals_plainly()
    found = tuple(part for part in __version_tuple__[:2] if isinstance(part, int))
    if (0, 0) < found < OLDEST_VLLM:  # 0.0 is a build from a source tree without tags
        from cast_serve.vllm_plugin.too_old import TooOldConfig

        register_quantization_config(QUANT_METHOD)(TooOldConfig)
        return
    from cast_serve.vllm_plugin.config import Cast24Config

    register_quantization_config(QUANT_METHOD)(Cast24Config)
