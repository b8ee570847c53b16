"""The worker of `python -m benchmarks.vllm_cpu`."""

import subprocess
import sys

import pytest

from benchmarks.cpu.job import Job, Turn
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
