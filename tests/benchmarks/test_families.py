"""The stages of `cast pipeline` with every model family: the real commands, on less text and under a shorter load.

The load test does not see which family it measures, so only two go that far: the others end with a request to
the engine.
"""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from benchmarks.load.measurements import BenchResult
from benchmarks.pipeline.stages import Outputs, Preset, stages
from cast_serve import cli
from cast_serve.engine import Engine
from cast_serve.engine.types import SamplingParams
from conversion.onnx import export
from tests.cast_serve.tiny_tokenizers import byte_level
from tests.cast_train.tiny import write_text
from tests.conversion.models import CONFIGS, make_model

MEASURED = ("llama-awkward", "gpt2")

# added to the commands of the stages; the last of repeated options counts
LESS = {
    "train": ["--steps", "4"],
    "eval": ["--tokens", "512"],
    "bench": ["--concurrency", "2", "--requests", "1", "--rounds", "1"],
}

AWKWARD = copy.deepcopy(CONFIGS["llama"])  # only o_proj has an input size (4 heads of 8) that is a multiple of 8
AWKWARD.update({"hidden_size": 36, "intermediate_size": 60, "head_dim": 8})

# model, dtype it is stored in, shard size, layers of the served graph in the 2:4 kernel (q, k and v are one; gate and
# up are where their rows fill panels)
CASES = {
    "llama": (CONFIGS["llama"], torch.bfloat16, "1GB", 2 * 5),
    "llama-awkward": (AWKWARD, torch.float32, "1GB", 2 * 1),
    "mistral-sharded": (CONFIGS["mistral"], torch.bfloat16, "20KB", 2 * 4),
    "qwen2": (CONFIGS["qwen2"], torch.float32, "1GB", 2 * 5),
    "qwen3": (CONFIGS["qwen3"], torch.float16, "1GB", 2 * 4),
    "granite": (CONFIGS["granite"], torch.float32, "1GB", 2 * 4),
    "gpt2": (CONFIGS["gpt2"], torch.float32, "1GB", 2 * 4),
    "opt": (CONFIGS["opt"], torch.float16, "1GB", 2 * 4),
}


def save_dense(config: PretrainedConfig, dtype: torch.dtype, shard_size: str, directory: Path) -> None:
    backend = byte_level()
    config = copy.deepcopy(config)
    config.vocab_size = backend.get_vocab_size()
    config.bos_token_id, config.eos_token_id = 0, 2
    make_model(config, sparse=False).to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.save_pretrained(directory)


def cast(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cast", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_dense_model_in_measured_sparse_endpoint_out(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dtype, shard_size, sparse_layers = CASES[case]
    source, to = tmp_path / "dense", Outputs(tmp_path / "out")
    save_dense(config, dtype, shard_size, source)
    assert len(list(source.glob("*.safetensors"))) == 1 or "sharded" in case
    data = write_text(tmp_path / "train.txt")
    heldout = write_text(tmp_path / "heldout.txt", characters=1500, seed=1)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for stage in stages(source, data, heldout, Preset.quick, to.root):
        if stage.name == "measure":  # the servers would export too, each in a process of its own
            for directory in (source, to.packed):
                export(directory, directory / "onnx")
            if case not in MEASURED:
                continue
        cast(monkeypatch, *stage.command, *LESS.get(stage.command[0], []))
        assert all(output.exists() for output in stage.outputs)

    for directory in (to.cast, to.oneshot("magnitude"), to.oneshot("sparsegpt")):
        weights = load_file(directory / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {dtype}
        linears = [
            weight.T if config.model_type == "gpt2" else weight
            for name, weight in weights.items()
            if weight.ndim == 2 and (".layers." in name or ".h." in name)
        ]
        packable = [weight for weight in linears if weight.shape[1] % 8 == 0]
        assert all(((weight != 0).reshape(-1, 4).sum(1) == 2).all() for weight in packable)
        assert all((weight != 0).all() for weight in linears if weight.shape[1] % 8)

    quality = json.loads(to.quality.read_text())["models"]
    assert all(1 < result["perplexity"] < float("inf") for result in quality.values())
    assert {result["context"] for result in quality.values()} == {64}  # as far as the models' positions reach
    if case not in MEASURED:
        engine = Engine(to.packed / "onnx")
        try:
            assert engine.info.sparse_layers == sparse_layers
            assert len(list(engine.submit([5, 6, 7], SamplingParams(4)))) == 4
        finally:
            engine.close()
        return
    measured = BenchResult.model_validate_json(to.measurements.read_bytes())
    served = measured.models["sparse"]
    assert (served.pattern, served.sparse_layers) == ("2:4", sparse_layers)
    assert measured.models["dense"].sparse_layers == 0
    assert (measured.settings.prompt_tokens, measured.settings.output_tokens) == (42, 21)  # of 64
    value_bytes = 2 if dtype == torch.bfloat16 else 4  # float16 has no kernel and becomes float32
    assert served.sparse_weight_bytes >= sum(w.numel() // 2 * value_bytes + w.numel() // 8 for w in packable)
    assert all(
        sample.error is None for round_ in measured.rounds for level in round_.levels for sample in level.samples
    )
    assert "2:4 sparse against dense" in to.page.read_text()
