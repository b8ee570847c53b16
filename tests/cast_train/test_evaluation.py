"""Perplexity is what transformers itself says."""

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from cast_train.evaluation import evaluate, heldout_windows, perplexity
from conversion.errors import InputError
from tests.cast_train.tiny import save_model, write_text


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)} | {"?": 50}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_perplexity_equals_the_loss_of_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(
        vocab_size=51, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    texts = [" ".join(f"w{(i * i + j) % 50}" for i in range(37)) for j in range(5)]
    windows = heldout_windows(texts, tokenizer, context=16, tokens=170)
    assert windows.shape == (10, 16)  # 170 of the 185 tokens, whole windows only
    model.eval()
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.double().item() for w in windows]
    assert perplexity(model, windows) == pytest.approx(math.exp(sum(losses) / 10), rel=1e-6)


def test_windows_are_no_longer_than_any_models_context(tmp_path: Path) -> None:
    short = save_model(tmp_path / "short", "gpt2")  # 64 positions, and a 65th would be out of its table
    text = write_text(tmp_path / "text.txt", characters=400)
    (result,) = evaluate([short], text, None, 200)["models"].values()
    assert result["context"] == 64
    assert result["tokens"] == 3 * 63
    with pytest.raises(InputError, match="short has a context of 64 tokens"):
        evaluate([short], text, 65, 200)


def test_text_shorter_than_a_window_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="3 tokens, less than one window of 16"):
        heldout_windows(["w1 w2 w3"], tokenizer, context=16, tokens=100)
