"""Two workers say what one says."""

from typing import Any

import pytest

from conversion.quantization.formats import INT4, INT8, Quantization
from tests.vllm.checkpoints import Checkpoints
from tests.vllm.engine import tokens

FLOAT_ACTIVATIONS = {"cast24_float_activations": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers", "quantization", "embedding"),
    [
        ("qwen2", {"tensor_parallel_size": 2}, Quantization(INT4, 32), Quantization(INT8, None)),
        # vLLM 0.32 on a CPU forgets to prepare for what other workers send, dense or not, unless it compiles
        (
            "llama",
            {"pipeline_parallel_size": 2, "enforce_eager": False},
            Quantization(INT8, None),
            Quantization(INT8, None),
        ),
    ],
    ids=["tensor-int4", "pipeline-int8"],
)
def test_workers_share_a_model(
    name: str,
    workers: dict[str, Any],
    quantization: Quantization,
    embedding: Quantization,
    checkpoints: Checkpoints,
) -> None:
    packed = checkpoints.packed(name, quantization, embedding)
    options = {"hf_overrides": FLOAT_ACTIVATIONS}
    shared = tokens(packed, **options, **workers, distributed_executor_backend="mp")
    assert shared == tokens(packed, **options)
