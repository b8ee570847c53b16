"""A tiny random model directory with a tokenizer of single characters, and text for it."""

import random
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cast_train.config import CastConfig
from tests.conversion.models import CONFIGS, make_model

EOS = "<eos>"
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gpt2", "opt"]


def tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens, as the tiny models have: one a printable character, EOS, unknown."""
    vocabulary = {character: i for i, character in enumerate(["<unk>", EOS, *string.printable[:95]])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, unk_token="<unk>")


def save_model(directory: Path, family: str = "llama") -> Path:
    make_model(CONFIGS[family], sparse=False).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def write_text(path: Path, characters: int = 6000, seed: int = 0) -> Path:
    generator = random.Random(seed)
    words = ["".join(generator.choices(string.ascii_lowercase, k=generator.randint(1, 8))) for _ in range(200)]
    text = ""
    while len(text) < characters:
        text += generator.choice(words) + " "
    path.write_text(text)
    return path


# A run of a second on a tiny model.
BUDGET: dict[str, object] = {
    "lr": 2e-3,
    "schedule": "linear",
    "batch_tokens": 64,
    "block_length": 16,
    "micro_batch_tokens": 32,
    "steps": 24,
    "save_steps": 7,
    "log_steps": 1,
    "precision": "fp32",
}


def config(**changes: object) -> CastConfig:
    """CAST within BUDGET; its masked weights start small."""
    return CastConfig(**{**BUDGET, "decay": 1e-2, "warm_start": "magnitude", "shrink": 0.2, **changes})
