"""The worker of `python -m benchmarks.vllm_cpu`, `python -m benchmarks.vllm_tokens`, and what
a GPU is to run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from benchmarks import vllm_tokens
from benchmarks.cpu.job import Job, Turn
from benchmarks.gpu import serving
from conversion.errors import InputError
from tests.vllm.checkpoints import Checkpoints


@pytest.mark.slow
def test_a_turn_in_vllm(checkpoints: Checkpoints) -> None:
    packed = checkpoints.packed("llama")
    job = Job("vllm", str(packed), 1, [[5, 6, 7, 8]] * 2, list(range(10, 30)), 6, [1, 2], dtype="float32")
    command = [sys.executable, "-m", "benchmarks.cpu.worker"]
    done = subprocess.run(command, input=job.to_json(), capture_output=True, text=True, check=True)
    turn = Turn.from_json(done.stdout)
    assert {users: speed.tokens for users, speed in turn.speeds.items()} == {1: 6, 2: 12}
    assert turn.speeds[2].decoded_tokens == 10
    assert turn.weight_memory is not None
    assert turn.about.startswith("vLLM ")


@pytest.mark.slow
def test_serving_is_rehearsed(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit):
        serving.main(tmp_path, tokens=5, tiny=True)
    forms = json.loads((tmp_path / "serving.json").read_text())["forms"]
    assert set(forms) == {serving.DENSE, *serving.FORMS}
    assert all(set(form["tokens_per_s"]) == {"1", "16"} for form in forms.values()), forms
    assert forms["packed bf16"]["same_as_dense"] > 0.5


@pytest.mark.slow
def test_tokens_are_compared(checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"word {i} and more"}) + "\n" for i in range(3)))

    def compared(packed: Path) -> int:
        with pytest.raises(typer.Exit) as end:
            vllm_tokens.main(checkpoints.dense("llama"), packed, text, prompts=3, tokens=6, mode=["eager"])
        return end.value.exit_code

    assert compared(checkpoints.packed("llama")) == 0
    assert "eager, batch 16: 3 of 3 prompts with the same 6 tokens" in capsys.readouterr().out
    assert compared(checkpoints.packed("qwen2")) == 1
    with pytest.raises(InputError, match="has 3 documents, and 4 prompts"):
        vllm_tokens.main(checkpoints.dense("llama"), checkpoints.packed("llama"), text, prompts=4)
