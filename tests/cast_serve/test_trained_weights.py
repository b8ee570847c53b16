"""Packed against masked-dense on a real model's weights, both served by the engine over HTTP."""

import threading
import time
from pathlib import Path

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.registry.model import fetch_model
from cast_serve.server.model import ServedModel
from cast_train.oneshot import prune
from conversion import save_packed, verify
from conversion.checkpoint import Checkpoint
from conversion.dense_model import dense_model
from conversion.onnx import export
from tests.cast_serve.live_server import live_server

PROMPTS = [
    "The capital of France is",
    "Water boils when",
    "In 1969, astronauts",
    "A list of fruits: apples,",
    "She opened the door and",
    "The main cause of the war was",
    "def fibonacci(n):",
    "Photosynthesis is the process by which",
    "The river flows through",
    "Once upon a time there was a",
    "To make bread you need flour,",
    "The largest planet of the solar system",
]
STAGGER_SECONDS = 0.03


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories: masked (2:4 weights stored dense), packed, and the ONNX exports sparse/ and dense/ of the two."""
    folder = tmp_path_factory.mktemp("smollm2")
    fetch_model(folder / "source")
    model = dense_model(Checkpoint(folder / "source"), torch.float32)
    prune(model, "magnitude")
    masked = folder / "masked"
    model.save_pretrained(masked)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (masked / file).write_bytes((folder / "source" / file).read_bytes())
    save_packed(masked, folder / "packed")
    export(folder / "packed", folder / "sparse")

    # The export makes sparse operators of whatever is 2:4. One masked weight that is not quite zero keeps the stock
    # dense graph for the same model: 1e-30 changes no sum in float32.
    twin = folder / "twin"
    masked.rename(twin)
    tensors = load_file(twin / "model.safetensors")
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    row, column = (weight == 0).nonzero()[0].tolist()
    weight[row, column] = 1e-30
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    export(twin, folder / "dense")
    weight[row, column] = 0.0
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    twin.rename(masked)
    return folder


def complete(client: openai.OpenAI, prompt: str) -> str:
    choice = client.completions.create(
        model="m", prompt=prompt, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
    ).choices[0]
    assert choice.text
    return choice.text


@pytest.mark.slow
def test_packed_equals_masked_dense_one_by_one_and_staggered(folder: Path) -> None:
    def load(kind: str) -> ServedModel:
        return ServedModel.load(folder / kind, "m", max_batch_size=8, threads=2)

    with live_server(lambda: load("dense")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert client.models.retrieve("m").model_dump()["cast24"]["sparse_layers"] == 0
        expected = [complete(client, prompt) for prompt in PROMPTS]

    with live_server(lambda: load("sparse")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert client.models.retrieve("m").model_dump()["cast24"]["sparse_layers"] == 120
        assert [complete(client, prompt) for prompt in PROMPTS] == expected

        staggered: dict[int, str] = {}

        def request(i: int) -> None:
            time.sleep(i * STAGGER_SECONDS)
            staggered[i] = complete(client, PROMPTS[i])

        threads = [threading.Thread(target=request, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [staggered[i] for i in range(len(PROMPTS))] == expected


@pytest.mark.slow
def test_verify_accepts_it(folder: Path) -> None:
    report = verify(folder / "packed", folder / "masked")
    assert report.sparse_layers == 210
