"""The server on the real engine, over a tiny random 2:4 Llama: what it says is what transformers would say."""

import asyncio
import json
import math
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest
import torch

from cast_serve.kernels import ISAS
from cast_serve.server.model import ServedModel
from tests.cast_serve.live_server import eventually, live_server
from tests.cast_serve.tiny_llama import CONTEXT, Tiny

SPARSE_LINEARS = 2 * 4  # per layer: qkv, o, gate and up, down


@pytest.fixture(scope="module")
def url(tiny: Tiny) -> Iterator[str]:
    with live_server(lambda: ServedModel.load(tiny.onnx, "tiny", max_batch_size=4, threads=1)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_greedy_completion_is_that_of_transformers(tiny: Tiny, client: openai.OpenAI) -> None:
    prompt = tiny.tokenizer.encode("Hello world, the quick")
    expected = tiny.greedy(prompt, 30)
    answer = client.completions.create(model="tiny", prompt="Hello world, the quick", max_tokens=30, temperature=0)
    assert answer.choices[0].text == tiny.text(expected)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected) + (answer.choices[0].finish_reason == "stop")


def test_streamed_chat_uses_the_models_template(tiny: Tiny, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Größe? 🙂"}]
    prompt = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=25,
        temperature=0,
        stream=True,  # type: ignore[arg-type]
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == tiny.text(tiny.greedy(prompt, 25))


def test_staggered_concurrent_requests_are_as_one_by_one(tiny: Tiny, url: str, client: openai.OpenAI) -> None:
    prompts = [[3 + (7 * i + j) % 300 for j in range(1 + 11 * i)] for i in range(12)]

    def body(i: int) -> dict:
        return {"model": "tiny", "prompt": prompts[i], "max_tokens": 6 + i, "temperature": 0}

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def one(i: int) -> str:
                await asyncio.sleep(0.01 * i)
                stream = await client.completions.create(stream=True, **body(i))
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(12)))

    together = asyncio.run(all_at_once())
    assert together == [client.completions.create(**body(i)).choices[0].text for i in range(12)]
    assert together == [tiny.text(tiny.greedy(prompts[i], 6 + i)) for i in range(12)]


def test_logprobs_are_those_of_transformers(tiny: Tiny, client: openai.OpenAI) -> None:
    prompt = tiny.tokenizer.encode("def add(a, b):")
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=6, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    out = tiny.model.generate(
        torch.tensor([prompt]), min_new_tokens=6, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    with torch.no_grad():
        expected = tiny.model(out).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = expected.gather(-1, out[0, len(prompt) :, None])[:, 0]
    assert logprobs.token_logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
    best = expected.topk(3).values
    assert logprobs.top_logprobs is not None
    for got, want in zip(logprobs.top_logprobs, best.tolist(), strict=True):
        assert sorted(got.values(), reverse=True) == pytest.approx(want, abs=1e-4)


def test_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        answer = client.completions.create(model="tiny", prompt="Hello", seed=seed, n=3, max_tokens=20)
        return [choice.text for choice in answer.choices]

    assert sample(5) == sample(5)
    assert len(set(sample(5))) == 3
    assert sample(6)[0] == sample(5)[1]  # choice i is sampled with seed + i


def test_stop_string_in_real_output(tiny: Tiny, client: openai.OpenAI) -> None:
    whole = (
        client.completions.create(
            model="tiny", prompt="fox", max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
        )
        .choices[0]
        .text
    )
    stop = whole[10:14]
    cut = client.completions.create(
        model="tiny", prompt="fox", max_tokens=40, temperature=0, stop=stop, extra_body={"ignore_eos": True}
    ).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_card_proves_what_runs(tiny: Tiny, client: openai.OpenAI) -> None:
    manifest = json.loads((tiny.onnx / "cast_onnx.json").read_text())
    card = client.models.retrieve("tiny").model_dump()["cast24"]
    assert (card["pattern"], card["value_dtype"], card["sparse_layers"]) == ("2:4", "float32", SPARSE_LINEARS)
    assert card["sparse_weight_bytes"] == manifest["sparse_weight_bytes"] > 0
    assert card["weight_bytes"] == manifest["weight_bytes"] > card["sparse_weight_bytes"]
    assert card["kernel"] in ISAS
    assert card["context_length"] == CONTEXT


def test_metrics_show_batches_and_an_empty_cache_after_work(url: str, client: openai.OpenAI) -> None:
    def metric(name: str) -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    before = metric("cast:iteration_batch_size_sum")
    client.completions.create(model="tiny", prompt=["a"] * 4, max_tokens=10, extra_body={"ignore_eos": True})
    assert metric("cast:iteration_batch_size_sum") == before + 40
    assert eventually(lambda: metric("cast:kv_cache_usage_perc") == 0 and metric("cast:num_requests_running") == 0)


def test_disconnect_frees_the_engine(url: str) -> None:
    def busy() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith("cast:num_requests_"))

    body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "ignore_eos": True, "n": 8, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    assert eventually(lambda: busy() == 0, 2)


def test_closing_the_engine_ends_streams_with_an_error(tiny: Tiny) -> None:
    models: list[ServedModel] = []

    def load() -> ServedModel:
        models.append(ServedModel.load(tiny.onnx, "tiny", threads=1))
        return models[0]

    with live_server(load) as url:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            threading.Thread(target=models[0].engine.close).start()
            rest = "\n".join(lines)
        assert '"code": "engine_error"' in rest or rest.count("data: ") == 250
        assert rest.rstrip().endswith("data: [DONE]")
        assert httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"}).status_code == 500


def test_probabilities_of_sampling_follow_temperature(client: openai.OpenAI) -> None:
    """At temperature 2 the first token of many samples spreads further than at 0.2."""

    def distinct(temperature: float) -> int:
        answers = client.completions.create(
            model="tiny", prompt="Hello", n=32, max_tokens=1, seed=0, temperature=temperature, logprobs=0
        )
        return len({(choice.logprobs.token_logprobs or [math.nan])[0] for choice in answers.choices if choice.logprobs})

    assert distinct(2.0) > distinct(0.2)
