"""The decoder that is measured on GPUs: it is a Llama, and its forms compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import decode
from benchmarks.gpu.decoder import THETA, Decoder
from benchmarks.shapes import SHAPES
from cast_serve.torch_model.modules import PackedLinear

CPU = torch.device("cpu")


def make(N: int, K: int) -> nn.Linear:
    return nn.Linear(K, N, bias=False)


def test_it_is_a_llama() -> None:
    sizes = SHAPES["tiny"] | {"num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": THETA}
    config = LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=False)
    llama = LlamaForCausalLM(config).eval()
    decoder = Decoder(config, make, make, 12, CPU, torch.float32)
    with torch.no_grad():
        decoder.embedding.copy_(llama.model.embed_tokens.weight)
        decoder.lm_head.weight.copy_(llama.lm_head.weight)  # type: ignore[operator, union-attr]
        for ours, theirs in zip(decoder.blocks, llama.model.layers, strict=True):
            attention, mlp = theirs.self_attn, theirs.mlp
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            ours.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            ours.o.weight.copy_(attention.o_proj.weight)
            ours.gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            ours.down.weight.copy_(mlp.down_proj.weight)
        ids = torch.randint(config.vocab_size, (3, 12))
        expected = llama(ids).logits
        decoder.set_batch(3)
        logits = torch.stack([decoder.logits(ids[:, i], i) for i in range(12)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["2:4 bf16", "2:4 int8", "2:4 int4 g128"])
def test_sparse_forms_are_what_they_claim(form: str) -> None:
    """The product of a random layer is that of some 2:4 weight, which multiplying by the identity shows."""
    linear = decode.FORMS[form][0](CPU, 40, 256)
    assert isinstance(linear, PackedLinear)
    weight = linear(torch.eye(256).bfloat16()).T.float()
    assert ((weight != 0).view(40, 64, 4).sum(-1) <= 2).all()
    assert (weight != 0).float().mean() > 0.3  # the rest was rounded to zero
    x = torch.randn(3, 256).bfloat16()
    torch.testing.assert_close(linear(x).float(), x.float() @ weight.T, rtol=2e-2, atol=0.2)


def test_copies_have_memory_of_their_own() -> None:
    copy = decode.copies_of_one(make)
    first, second, other = copy(4, 8), copy(4, 8), copy(8, 4)
    assert torch.equal(first.weight, second.weight)  # type: ignore[arg-type]
    assert first.weight.data_ptr() != second.weight.data_ptr()  # type: ignore[operator, union-attr]
    assert other.weight.shape == (8, 4)


def test_a_rehearsal_writes_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as end:
        decode.main(tmp_path, tiny=True)
    assert end.value.exit_code == 0
    forms = json.loads((tmp_path / "decode.json").read_text())["forms"]
    assert list(forms) == ["dense bf16", "2:4 bf16", "2:4 int8", "2:4 int4 g128", "2:4 int4 g128, int8 lm_head"]
    assert all(set(form["seconds"]) == {"1", "8", "32"} for form in forms.values())
    sizes = [form["weight_bytes"] for form in forms.values()]
    assert sizes == sorted(sizes, reverse=True)

    def fails(*_: Any) -> nn.Module:
        raise RuntimeError("no such kernel")

    broken = {"2:4 bf16": (fails, fails), "2:4 int8": decode.FORMS["2:4 int8"]}
    monkeypatch.setattr(decode, "FORMS", broken)
    with pytest.raises(typer.Exit) as end:
        decode.main(tmp_path, tiny=True)
    assert end.value.exit_code == 1
    assert "2:4 bf16: failed, RuntimeError: no such kernel" in capsys.readouterr().out
    assert "seconds" in json.loads((tmp_path / "decode.json").read_text())["forms"]["2:4 int8"]
