"""The engine end to end on tiny random Llamas, dense and 2:4, against transformers."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cast_serve.engine import Engine, EngineError
from cast_serve.engine.types import SamplingParams, TokenEvent
from cast_serve.kernels import ISAS
from conversion.errors import InputError
from conversion.onnx import export

VOCABULARY, CONTEXT = 97, 256
GREEDY = SamplingParams(max_tokens=20, temperature=0)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def make_24(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.dim() == 2:
            groups = parameter.data.view(len(parameter), -1, 4)
            groups.scatter_(-1, groups.abs().topk(2, largest=False).indices, 0.0)


@pytest.fixture(scope="module", params=["dense", "2:4"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    model = tiny_llama()
    if request.param == "2:4":
        make_24(model)
    folder = tmp_path_factory.mktemp("engine")
    model.save_pretrained(folder / "hf")
    export(folder / "hf", folder / "onnx")
    return model, folder / "onnx"


@pytest.fixture(scope="module")
def engine(exported: tuple[PreTrainedModel, Path]) -> Iterator[Engine]:
    engine = Engine(exported[1], max_batch_size=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(exported: tuple[PreTrainedModel, Path]) -> PreTrainedModel:
    return exported[0]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(1000 * seed + length).integers(0, VOCABULARY, length).tolist()


def events(engine: Engine, prompt_ids: list[int], params: SamplingParams) -> list[TokenEvent]:
    return list(engine.submit(prompt_ids, params))


def tokens(engine: Engine, prompt_ids: list[int], params: SamplingParams) -> list[int]:
    return [event.token_id for event in events(engine, prompt_ids, params)]


def greedy(model: PreTrainedModel, prompt_ids: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt_ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt_ids) :].tolist()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 150])
def test_greedy_tokens_are_those_of_transformers(engine: Engine, model: PreTrainedModel, length: int) -> None:
    assert tokens(engine, prompt(length), GREEDY) == greedy(model, prompt(length), 20)


def test_info_says_what_runs(engine: Engine, model: PreTrainedModel, exported: tuple[PreTrainedModel, Path]) -> None:
    manifest = json.loads((exported[1] / "cast_onnx.json").read_text())
    info = engine.info
    assert (info.pattern, info.vocab_size, info.context_length) == (manifest["pattern"], VOCABULARY, CONTEXT)
    # q, k and v are one linear of the graph; gate and up are not, as 136 rows are no whole panels.
    assert info.sparse_layers == (2 * 5 if info.pattern == "2:4" else 0)
    assert info.sparse_weight_bytes == manifest["sparse_weight_bytes"]
    assert info.weight_bytes == manifest["weight_bytes"]
    assert info.kernel in ISAS


def test_staggered_requests_are_as_one_by_one(engine: Engine) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate((3, 140, 17, 1, 60, 16, 200, 5, 33, 90, 2, 31))]
    params = [replace(GREEDY, max_tokens=45 - 3 * i) for i in range(len(prompts))]
    alone = [tokens(engine, ids, p) for ids, p in zip(prompts, params, strict=True)]
    engine.stats()
    generations = []
    for i, (ids, p) in enumerate(zip(prompts, params, strict=True)):
        generations.append(engine.submit(ids, p))
        if i > 5:
            time.sleep(0.002 * (i % 3))
    assert [[event.token_id for event in generation] for generation in generations] == alone
    assert max(engine.stats().batch_sizes) == 4
    assert engine.stats().kv_tokens_used == 0


def test_a_seed_repeats_its_tokens_whatever_else_runs(engine: Engine) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.3, top_p=0.9, seed=5)
    first = tokens(engine, prompt(8), params)
    others = [engine.submit(prompt(20, seed), replace(params, seed=seed, max_tokens=60)) for seed in range(3)]
    assert tokens(engine, prompt(8), params) == first
    assert tokens(engine, prompt(8), replace(params, seed=6)) != first
    for other in others:
        other.cancel()


def test_logprobs_are_those_of_transformers(engine: Engine, model: PreTrainedModel) -> None:
    found = events(engine, prompt(12), replace(GREEDY, temperature=0.7, seed=1, logprobs=5))
    sequence = torch.tensor([prompt(12) + [event.token_id for event in found]])
    with torch.no_grad():
        expected = model(sequence).logits[0].double().log_softmax(-1)[11:-1]
    for event, row in zip(found, expected, strict=True):
        assert event.logprob == pytest.approx(row[event.token_id].item(), abs=1e-4)
        top = row.topk(5)
        assert [token for token, _ in event.top_logprobs] == top.indices.tolist()
        assert [logprob for _, logprob in event.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert events(engine, prompt(12), replace(GREEDY, max_tokens=1))[0].logprob is None


def test_a_stop_token_ends_and_is_reported(engine: Engine) -> None:
    free = tokens(engine, prompt(9), GREEDY)
    stop = free[6]
    found = events(engine, prompt(9), replace(GREEDY, stop_token_ids=frozenset({stop})))
    assert [event.token_id for event in found] == free[: free.index(stop) + 1]
    assert [event.finish_reason for event in found] == [None] * free.index(stop) + ["stop"]
    assert events(engine, prompt(9), GREEDY)[-1].finish_reason == "length"


def test_a_full_context_ends_with_length(engine: Engine) -> None:
    found = events(engine, prompt(CONTEXT - 3), GREEDY)
    assert [event.finish_reason for event in found] == [None, None, "length"]


def test_cancelling_frees_the_cache_and_ends_the_stream(engine: Engine) -> None:
    generation = engine.submit(prompt(30), replace(GREEDY, max_tokens=200))
    next(generation)
    assert engine.stats().kv_tokens_used >= 32
    generation.cancel()
    assert all(event.finish_reason is None for event in generation)
    wait_until(lambda: engine.stats().kv_tokens_used == 0)
    generation.cancel()
    assert tokens(engine, prompt(5), GREEDY)


def test_asyncio_consumers(engine: Engine) -> None:
    async def consume(seed: int) -> list[int]:
        return [event.token_id async for event in engine.submit(prompt(10, seed), GREEDY)]

    async def consume_all() -> list[list[int]]:
        return await asyncio.gather(*(consume(seed) for seed in range(6)))

    assert asyncio.run(consume_all()) == [tokens(engine, prompt(10, seed), GREEDY) for seed in range(6)]


@pytest.mark.parametrize(
    ("prompt_ids", "params", "message"),
    [
        ([], GREEDY, "no tokens"),
        (prompt(CONTEXT), GREEDY, f"{CONTEXT} tokens, but the context holds {CONTEXT}"),
        ([VOCABULARY], GREEDY, r"lie in 0\.\.96"),
        ([1], replace(GREEDY, max_tokens=0), "max_tokens"),
        ([1], replace(GREEDY, temperature=-1), "temperature"),
        ([1], replace(GREEDY, temperature=float("nan")), "temperature"),
        ([1], replace(GREEDY, top_p=0), "top_p"),
        ([1], replace(GREEDY, logprobs=-1), "logprobs"),
        ([1], replace(GREEDY, seed=-1), "seed"),
    ],
)
def test_bad_requests_are_refused(engine: Engine, prompt_ids: list[int], params: SamplingParams, message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.submit(prompt_ids, params)


@pytest.fixture
def onnx_dir(exported: tuple[PreTrainedModel, Path]) -> Path:
    return exported[1]


def test_a_small_cache_makes_requests_wait_and_changes_no_token(engine: Engine, onnx_dir: Path) -> None:
    prompts = [prompt(40, seed) for seed in range(5)]
    params = replace(GREEDY, max_tokens=70)
    expected = [tokens(engine, ids, params) for ids in prompts]
    small = Engine(onnx_dir, max_batch_size=4, kv_cache_tokens=192)  # one and a half of these requests
    try:
        assert small.info.context_length == 192
        generations = [small.submit(ids, params) for ids in prompts]
        wait_until(lambda: small.stats().waiting > 0)
        assert [[event.token_id for event in generation] for generation in generations] == expected
        stats = small.stats()
        assert (stats.running, stats.waiting, stats.kv_tokens_used, stats.kv_tokens_total) == (0, 0, 0, 192)
        with pytest.raises(InputError, match="context holds 192"):
            small.submit(prompt(192), params)
    finally:
        small.close()


def test_an_idle_engine_gives_cache_memory_back_and_goes_on(engine: Engine) -> None:
    caches = [value.numpy() for value in engine._model._caches.inputs.values()]
    expected = tokens(engine, prompt(40), GREEDY)
    wait_until(lambda: not any(cache.any() for cache in caches))
    generation = engine.submit(prompt(40), GREEDY)
    found = [event.token_id for event in generation]
    assert all(cache.any() for cache in caches)
    assert found == expected


def test_a_failing_step_fails_its_requests_and_no_others(onnx_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(onnx_dir, max_batch_size=2)
    run = engine._model.run

    def failing(chunks: Any) -> np.ndarray:
        if any(chunk.sequence.tokens[0] == 13 for chunk in chunks):
            raise RuntimeError("out of luck")
        return run(chunks)

    monkeypatch.setattr(engine._model, "run", failing)
    try:
        bad = engine.submit([13, 1], GREEDY)
        with pytest.raises(EngineError, match="the model failed: out of luck"):
            list(bad)
        assert len(tokens(engine, [7, 1], GREEDY)) == 20
        assert engine.stats().kv_tokens_used == 0
    finally:
        engine.close()


def test_an_engine_that_stopped_says_so_to_everyone(onnx_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(onnx_dir, max_batch_size=1)
    steps, submitted = iter([engine._scheduler.schedule] * 3), threading.Event()
    monkeypatch.setattr(engine._scheduler, "schedule", lambda: next(steps)())
    run = engine._model.run
    monkeypatch.setattr(engine._model, "run", lambda chunks: (submitted.wait(), run(chunks))[1])
    generations = [engine.submit([7, 1], GREEDY) for _ in range(3)]
    submitted.set()
    for generation in generations:
        with pytest.raises(EngineError, match="the engine has stopped: StopIteration"):
            list(generation)
    assert engine.failure is not None
    with pytest.raises(EngineError, match="the engine has stopped"):
        engine.submit([7, 1], GREEDY)
    engine.close()


def test_closing_ends_every_stream(onnx_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(onnx_dir, max_batch_size=1)
    run = engine._model.run
    monkeypatch.setattr(engine._model, "run", lambda chunks: (time.sleep(0.01), run(chunks))[1])  # still busy at close
    generations = [engine.submit(prompt(5, seed), replace(GREEDY, max_tokens=250)) for seed in range(3)]
    failures: list[str] = []

    def consume(generation: Any) -> None:
        try:
            list(generation)
        except EngineError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=consume, args=(generation,)) for generation in generations]
    for thread in threads:
        thread.start()
    engine.close()
    for thread in threads:
        thread.join(10)
    assert failures == ["the engine was closed"] * 3
    with pytest.raises(EngineError, match="closed"):
        engine.submit([1], GREEDY)


def test_damaged_directories_are_refused(onnx_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no cast_onnx\.json"):
        Engine(tmp_path / "nowhere")

    def damaged(name: str, content: bytes) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(onnx_dir, folder)
        (folder / name).write_bytes(content)
        return folder

    manifest = json.loads((onnx_dir / "cast_onnx.json").read_text())
    for change, message in (
        ({"version": 1}, "has version 1"),
        ({"eos_token_ids": None}, "'eos_token_ids' is no list"),
        ({"inputs": ["input_ids"]}, "name different inputs"),
        ({"sparse_layers": 99}, "speaks of 99 sparse layers"),
        ({"head_dim": 8}, "cannot be executed"),
    ):
        with pytest.raises(InputError, match=message):
            Engine(damaged("cast_onnx.json", json.dumps(manifest | change).encode()))
    with pytest.raises(InputError, match="damaged"):
        Engine(damaged("cast_onnx.json", b"{"))
    del manifest["eos_token_ids"]
    with pytest.raises(InputError, match=r"damaged.*eos_token_ids"):
        Engine(damaged("cast_onnx.json", json.dumps(manifest).encode()))
    with pytest.raises(InputError, match="cannot be loaded"):
        Engine(damaged("model.onnx", b"\x00\x01nonsense"))
    weights = (onnx_dir / "model.onnx.data").read_bytes()
    with pytest.raises(InputError, match="cannot be loaded"):
        Engine(damaged("model.onnx.data", weights[: len(weights) // 2]))
