"""The teacher's top k on disk: the loss against float64 references, and runs that need no teacher."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cast_train.teacher_cache
import cast_train.training
from cast_train.dataset import TokenBlocks, TokenCache
from cast_train.distillation import TeacherTop, distillation_loss
from cast_train.health import read_metrics
from cast_train.teacher_cache import CachedBlocks, TeacherCache, fill, top_k
from cast_train.training import train
from conversion.errors import InputError
from tests.cast_train.tiny import config, save_model, write_text
from tests.conversion.models import CONFIGS, make_model

VOCABULARY = 97


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [2, 9, 8], head [V, 8], labels [2, 9], logits of a teacher [2, 8, V], all float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCABULARY, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, (2, 9), generator=generator)
    labels[0, 3] = -100
    return hidden, head, labels, 2 * torch.randn(2, 8, VOCABULARY, generator=generator, dtype=torch.float64)


def top_of(logits: Tensor, k: int) -> TeacherTop:
    """Independent of top_k: sorts."""
    log_probs, ids = logits.log_softmax(-1).sort(descending=True)
    tail = log_probs[..., k:].exp().sum(-1).log()
    return TeacherTop(ids[..., :k], log_probs[..., :k], tail)


def reference(hidden: Tensor, head: Tensor, labels: Tensor, top: TeacherTop, eta: float) -> tuple[Tensor, Tensor]:
    """(loss, KL) with the k tokens and "any other" as the events, by autograd."""
    log_q = (hidden[:, :-1] @ head.t()).log_softmax(-1)
    chosen = torch.zeros_like(log_q).scatter(-1, top.ids, 1.0)
    log_q_tail = (log_q.exp() * (1 - chosen)).sum(-1).log()
    kl = (top.log_probs.exp() * (top.log_probs - log_q.gather(-1, top.ids))).sum(-1)
    kl = kl + top.tail.exp() * (top.tail - log_q_tail)
    keep = labels[:, 1:] != -100
    ce = -log_q.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0][keep].mean()
    return eta * kl[keep].mean() + (1 - eta) * ce, kl[keep].mean()


@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1])
def test_loss_and_gradients_are_those_of_k_tokens_and_any_other(k: int) -> None:
    hidden, head, labels, teacher = problem()
    top = top_of(teacher, k)
    expected, kl = reference(hidden, head, labels, top, eta=0.4)
    gradients = torch.autograd.grad(expected, (hidden, head))
    losses = distillation_loss(hidden, head, labels, teacher_top=top, eta=0.4, chunk_tokens=4)
    torch.testing.assert_close(losses.loss, expected, rtol=1e-6, atol=0)  # the mass is brought to 1 in float32
    torch.testing.assert_close(losses.kl, kl, rtol=1e-5, atol=0)
    for mine, theirs in zip(torch.autograd.grad(losses.loss, (hidden, head)), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_kl_grows_with_k_to_the_true_one() -> None:
    hidden, head, labels, teacher = problem()
    kl = [
        distillation_loss(hidden, head, labels, teacher_top=top_of(teacher, k)).kl.item()
        for k in (1, 4, 16, 64, VOCABULARY - 1)
    ]
    log_p, log_q = teacher.log_softmax(-1), (hidden[:, :-1] @ head.t()).log_softmax(-1)
    true = (log_p.exp() * (log_p - log_q)).sum(-1)[labels[:, 1:] != -100].mean().item()
    assert kl == sorted(kl)
    assert kl[-1] == pytest.approx(true, rel=1e-5)


def test_top_k_keeps_the_most_likely_and_the_rest_of_the_mass() -> None:
    logits = problem()[3][0]
    expected = top_of(logits, 7)
    ids, log_probs, tail = top_k(logits, 7)
    assert torch.equal(ids, expected.ids)
    torch.testing.assert_close(log_probs.double(), expected.log_probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tail.double(), expected.tail, rtol=1e-5, atol=1e-6)


def blocks(count: int) -> TokenBlocks:
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, 6 * 8 + 3).astype(np.uint16)
    return TokenBlocks(TokenCache(tokens, "text", int(tokens.max())), 8, count, seed=3)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_an_interrupted_filling_goes_on_and_later_passes_find_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    teacher = make_model(CONFIGS[family], sparse=False).eval()
    text = blocks(14)  # six blocks of text: more than two passes
    assert text.rows == 6
    cache = TeacherCache.open(tmp_path / "cache", {"data": "a"}, 6, 7, 5, VOCABULARY)
    calls: list[int] = []

    def failing(logits: Tensor, k: int) -> Any:
        calls.append(len(logits))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return top_k(logits, k)

    with monkeypatch.context() as patch:
        patch.setattr(cast_train.teacher_cache, "top_k", failing)
        with pytest.raises(KeyboardInterrupt):
            fill(cache, text, teacher, batch=2, bf16=False, progress=False)
    cache = TeacherCache.open(tmp_path / "cache", {"data": "a"}, 6, 7, 5, VOCABULARY)
    assert cache.done.tolist() == [1, 1, 0, 0, 0, 0]
    for part in ((0, 2), (1, 2)):
        fill(cache, text, teacher, batch=2, bf16=False, part=part, progress=False)
    assert cache.done.all()
    examples = CachedBlocks(text, cache)
    for index in (0, 5, 6, 11, 13):
        example = examples[index]
        with torch.no_grad():
            logits = teacher(input_ids=example["input_ids"][None]).logits[0, :-1]
        ids, log_probs, tail = top_k(logits, 5)
        assert torch.equal(example["teacher_ids"], ids)
        torch.testing.assert_close(example["teacher_log_probs"], log_probs, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(example["teacher_tail"], tail, rtol=1e-3, atol=1e-3)


def test_another_runs_cache_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    TeacherCache.open(tmp_path / "cache", {"data": "a", "seed": 1}, 6, 7, 5, VOCABULARY)
    with pytest.raises(InputError, match=r"seed was 1, is 2"):
        TeacherCache.open(tmp_path / "cache", {"data": "a", "seed": 2}, 6, 7, 5, VOCABULARY)
    with pytest.raises(InputError, match=r"k was 5, is 6"):
        TeacherCache.open(tmp_path / "cache", {"data": "a", "seed": 1}, 6, 7, 6, VOCABULARY)
    with pytest.raises(InputError, match="between 1 and 96"):
        TeacherCache.open(tmp_path / "new", {}, 6, 7, VOCABULARY, VOCABULARY)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="holds no teacher cache"):
        TeacherCache.open(tmp_path / "other", {}, 6, 7, 5, VOCABULARY)


def test_a_full_disk_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the second file, and a retry that keeps fewer tokens finds the directory empty."""
    made: list[int] = []

    def full(file: int, start: int, size: int) -> None:
        made.append(size)
        if len(made) == 2:
            raise OSError(28, "No space left on device")
        os.ftruncate(file, size)

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match="No space left on device"):
        TeacherCache.open(tmp_path / "cache", {}, 6, 7, 5, VOCABULARY)
    assert list((tmp_path / "cache").iterdir()) == []
    TeacherCache.open(tmp_path / "cache", {}, 6, 7, 3, VOCABULARY)


def test_what_a_kill_leaves_is_taken_up_by_a_retry(tmp_path: Path) -> None:
    """Between two of its files, as SIGKILL runs no handler."""
    TeacherCache.open(tmp_path / "cache", {}, 6, 7, 5, VOCABULARY)
    for name in ("tail.bin", "done.bin"):
        (tmp_path / "cache" / name).unlink()
    assert not TeacherCache.open(tmp_path / "cache", {}, 6, 7, 5, VOCABULARY).done.any()


def test_meta_is_the_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(path: Path, *arguments: Any) -> Any:
        assert (path.parent / "meta.json").is_file()
        return original(path, *arguments)

    original = cast_train.teacher_cache._map
    monkeypatch.setattr(cast_train.teacher_cache, "_map", first)
    TeacherCache.open(tmp_path / "cache", {}, 6, 7, 5, VOCABULARY)


def test_a_shorter_run_takes_the_first_rows(tmp_path: Path) -> None:
    teacher = make_model(CONFIGS["llama"], sparse=False).eval()
    long = TeacherCache.open(tmp_path / "cache", {"data": "a"}, 6, 7, 5, VOCABULARY)
    fill(long, blocks(6), teacher, batch=2, bf16=False, progress=False)
    text = blocks(4)
    short = TeacherCache.open(tmp_path / "cache", {"data": "a"}, text.rows, 7, 5, VOCABULARY)
    assert short.done.tolist() == [1] * 4
    for index in range(4):
        assert torch.equal(text[index]["input_ids"], blocks(6)[index]["input_ids"])
        for name, tensor in long.row(index).items():
            assert torch.equal(short.row(index)[name], tensor)
    with pytest.raises(InputError, match="rows was 6, is 8"):
        TeacherCache.open(tmp_path / "cache", {"data": "a"}, 8, 7, 5, VOCABULARY)
    assert (tmp_path / "cache" / "done.bin").stat().st_size == 6


def test_a_second_run_needs_no_teacher_and_trains_as_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = save_model(tmp_path / "dense"), write_text(tmp_path / "text.txt")
    options: dict[str, Any] = {"cache_dir": tmp_path / "tokens"}
    settings = config(steps=8, save_steps=100)
    train(source, [str(text)], tmp_path / "live", settings, **options)
    cached = settings.model_copy(update={"teacher_top_k": 96})
    options["teacher_cache"] = tmp_path / "teacher"
    train(source, [str(text)], tmp_path / "first", cached, **options)
    monkeypatch.setattr(cast_train.training, "fill", None)  # would be called
    train(source, [str(text)], tmp_path / "second", cached, **options)
    live, first, second = (read_metrics(tmp_path / out / "metrics.jsonl") for out in ("live", "first", "second"))
    for name in ("loss", "kl", "ce"):
        assert [line[name] for line in first] == [line[name] for line in second]
        assert [line[name] for line in first] == pytest.approx([line[name] for line in live], rel=2e-3)
    with pytest.raises(InputError, match="seed was 0, is 1"):
        train(source, [str(text)], tmp_path / "third", cached.model_copy(update={"seed": 1}), **options)
    with pytest.raises(InputError, match="give both or neither"):
        train(source, [str(text)], tmp_path / "third", settings, **options)
    with pytest.raises(InputError, match="temperature 1"):
        config(teacher_top_k=4, temperature=2.0)
