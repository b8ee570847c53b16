"""The chunked loss against the naive one, in float64, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cast_train.distillation import DistillationLoss, distillation_loss

BATCH, LENGTH, HIDDEN, TEACHER_HIDDEN, VOCAB = 2, 9, 16, 12, 50


def make(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, VOCAB, (BATCH, LENGTH))
    labels[0, 3] = labels[1, 1] = labels[1, 2] = labels[0, 0] = -100
    return {
        "hidden": torch.randn(BATCH, LENGTH, HIDDEN, dtype=dtype, requires_grad=True),
        "head": torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True),
        "labels": labels,
        "teacher_hidden": torch.randn(BATCH, LENGTH, TEACHER_HIDDEN, dtype=dtype),
        "teacher_head": torch.randn(VOCAB, TEACHER_HIDDEN, dtype=dtype),
    }


def naive(inputs: dict[str, Tensor], eta: float, temperature: float = 1.0) -> DistillationLoss:
    student = (inputs["hidden"] @ inputs["head"].t())[:, :-1].reshape(-1, VOCAB)
    teacher = (inputs["teacher_hidden"] @ inputs["teacher_head"].t())[:, :-1].reshape(-1, VOCAB)
    targets = inputs["labels"][:, 1:].reshape(-1)
    student, teacher, targets = (t[targets != -100] for t in (student, teacher, targets))
    ce = F.cross_entropy(student, targets)
    log_student, log_teacher = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    kl = temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()
    return DistillationLoss(eta * kl + (1 - eta) * ce, ce, kl)


@pytest.mark.parametrize("eta", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_equals_the_naive_loss(eta: float, temperature: float, chunk_tokens: int) -> None:
    ours, reference = make(), make()
    losses = distillation_loss(**ours, eta=eta, temperature=temperature, chunk_tokens=chunk_tokens)
    expected = naive(reference, eta, temperature)
    for name in ("loss", "ce", "kl"):
        torch.testing.assert_close(getattr(losses, name), getattr(expected, name))
    (losses.loss * 3).backward()
    (expected.loss * 3).backward()
    torch.testing.assert_close(ours["hidden"].grad, reference["hidden"].grad)
    torch.testing.assert_close(ours["head"].grad, reference["head"].grad)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    inputs = make()
    losses = distillation_loss(inputs["hidden"], inputs["head"], inputs["labels"])
    torch.testing.assert_close(losses.loss, naive(inputs, 0.0).loss)
    assert losses.kl == 0


def test_a_frozen_head_gets_no_gradient() -> None:
    ours, reference = make(), make()
    ours["head"].requires_grad_(False)
    distillation_loss(**ours, eta=0.5, chunk_tokens=4).loss.backward()
    naive(reference, 0.5).loss.backward()
    assert ours["head"].grad is None
    torch.testing.assert_close(ours["hidden"].grad, reference["hidden"].grad)


def test_a_tied_embedding_gets_both_gradients() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH))
    teacher = {name: make()[name] for name in ("teacher_hidden", "teacher_head")}
    gradients = []
    for loss in (lambda **kw: distillation_loss(**kw, eta=0.5, chunk_tokens=4), lambda **kw: naive(kw, 0.5)):
        embedding = torch.linspace(-1, 1, VOCAB * HIDDEN, dtype=torch.float64).view(VOCAB, HIDDEN).sin()
        embedding.requires_grad_()
        loss(hidden=embedding[ids].tanh(), head=embedding, labels=ids, **teacher).loss.backward()
        gradients.append(embedding.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_under_autocast_it_stays_close() -> None:
    inputs = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distillation_loss(**inputs, eta=0.5)
    losses.loss.backward()
    assert losses.loss.dtype == inputs["hidden"].grad.dtype == torch.float32
    torch.testing.assert_close(losses.loss, naive(inputs, 0.5).loss, rtol=0.02, atol=0.02)


def test_never_holds_the_logits_of_all_tokens() -> None:
    """Largest tensor made inside: a chunk of logits, not [tokens, vocab]."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    torch.manual_seed(0)
    hidden = torch.randn(1, 257, 8, requires_grad=True)
    head = torch.randn(300, 8)
    with Watch():
        distillation_loss(
            hidden, head, torch.zeros(1, 257, dtype=torch.long), hidden.detach(), head, chunk_tokens=32
        ).loss.backward()
    assert largest <= 32 * 300


def test_without_a_token_to_learn_the_loss_is_zero() -> None:
    inputs = make()
    hidden, head = inputs["hidden"].requires_grad_(), inputs["head"].requires_grad_()
    losses = distillation_loss(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)})
    losses.loss.backward()
    assert losses.loss == losses.ce == losses.kl == 0
    assert hidden.grad is not None
    assert head.grad is not None
    assert not hidden.grad.any()
    assert not head.grad.any()
