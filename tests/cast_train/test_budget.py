"""The decay budget against AdamS itself, run on masked weights whose gradients are noise."""

import re
import time

import pytest
import torch
from torch import Tensor

from cast_train import AdamS, CastConfig, decay_budget, sparsify
from cast_train import budget as budget_module
from cast_train.adams import SecondMoment
from cast_train.budget import masked_magnitudes
from cast_train.schedule import Schedule, lr_factor
from cast_train.sparse_model import scope
from conversion.errors import InputError
from tests.cast_train.tiny import FAMILIES, config
from tests.conversion.models import CONFIGS, make_model


def simulated_distance(settings: CastConfig, momentum: float) -> float:
    """Mean way of far-away masked weights towards zero, gradients being noise whose momentum has the given size."""
    torch.manual_seed(0)
    parameter = torch.tensor([100.0, 100.0, 50.0, 50.0]).repeat(1000, 1).double().requires_grad_()
    optimizer = AdamS(
        [{"params": [parameter], "sparse": True}],
        settings.lr,
        settings.betas,
        settings.eps,
        decay=settings.decay,
        total_steps=settings.total_steps,
        second_moment=settings.second_moment,
    )
    beta1 = settings.betas[0]
    noise = momentum / ((1 - beta1) / (1 + beta1)) ** 0.5
    for step in range(settings.total_steps):
        factor = lr_factor(step, settings.total_steps, settings.warmup_ratio, settings.schedule)
        optimizer.param_groups[0]["lr"] = settings.lr * factor
        parameter.grad = torch.randn_like(parameter) * noise
        optimizer.step()
    return 50.0 - parameter[:, 2:].mean().item()


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("decay", [1e-5, 3e-5, 1e-3])
@pytest.mark.parametrize("steps", [60, 400])
@pytest.mark.parametrize("second_moment", ["update", "gradient"])
def test_distance_is_what_adams_does(schedule: Schedule, decay: float, steps: int, second_moment: SecondMoment) -> None:
    momentum = 2e-5
    settings = config(lr=1e-3, schedule=schedule, decay=decay, steps=steps, second_moment=second_moment)
    budget = decay_budget(make_model(CONFIGS["llama"], sparse=False), settings, momentum)
    assert budget.distance == pytest.approx(simulated_distance(settings, momentum), rel=0.1)


def test_rule_of_thumb_without_a_measured_momentum() -> None:
    settings = config(lr=6e-4, schedule="linear", warmup_ratio=0.0, steps=2800)
    budget = decay_budget(make_model(CONFIGS["llama"], sparse=False), settings)
    assert budget.distance == pytest.approx(0.167 * 6e-4 * 2800, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_the_weights_that_the_mask_would_cut(family: str) -> None:
    model = make_model(CONFIGS[family], sparse=False)
    by_hand = []
    for _, layer in scope(model):
        rows = layer.weight.t() if family == "gpt2" else layer.weight
        by_hand.append(rows.detach().abs().reshape(-1, 4).sort(dim=1).values[:, :2].reshape(-1))
    expected = torch.cat(by_hand)
    budget = decay_budget(sparsify(model, config()), config())
    assert budget.masked_mean == pytest.approx(expected.mean().item(), rel=1e-5)
    assert budget.masked_p99 == pytest.approx(expected.quantile(0.99).item(), rel=1e-2)
    assert sum(len(magnitudes) for magnitudes in masked_magnitudes(model)) == len(expected)


@pytest.mark.parametrize("momentum", [None, 2e-5])
def test_refusal_names_a_learning_rate_and_a_step_count_that_would_do(momentum: float | None) -> None:
    model = make_model(CONFIGS["llama"], sparse=False)
    settings = config(lr=1e-4, decay=1e-3, steps=30)
    budget = decay_budget(model, settings, momentum)
    with pytest.raises(InputError) as refusal:
        budget.check()
    found = re.search(r"learning rate (\S+) or (\d+) steps", str(refusal.value))
    assert found is not None
    for change in ({"lr": float(found[1]) * 1.05}, {"steps": int(found[2])}):
        enough = decay_budget(model, settings.model_copy(update=change), momentum)
        assert enough.distance >= enough.masked_p99
        enough.check()


def test_a_tiny_learning_rate_gets_its_step_count_at_once() -> None:
    """One by one the steps would take hours to add up."""
    settings = config(lr=1e-9, decay=1e-3, steps=30)
    start = time.monotonic()
    budget = decay_budget(make_model(CONFIGS["llama"], sparse=False), settings, 2e-5)
    assert time.monotonic() - start < 60
    assert budget.steps_needed is not None
    assert budget.steps_needed == pytest.approx(2 * budget.masked_p99 / 1e-9, rel=0.5)  # the mean rate is about lr / 2


def test_without_decay_the_refusal_names_no_learning_rate() -> None:
    model = make_model(CONFIGS["llama"], sparse=False)
    with pytest.raises(InputError, match=r"^a decay of 0 moves no masked weight, .* give a decay"):
        decay_budget(model, config(decay=0.0), 2e-5).check()
    with pytest.raises(InputError, match=r"use \d+ steps, start from"):  # decay is still zero in the first step
        decay_budget(model, config(steps=1), 2e-5).check()


def test_magnitudes_of_one_layer_at_a_time_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIGS["llama"], sparse=False)
    held = []

    def counted(tensors: list[Tensor]) -> Tensor:
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        return cat(tensors)

    cat = torch.cat
    monkeypatch.setattr(budget_module, "_SAMPLE", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", counted)
        budget = decay_budget(model, config(), 2e-5)
    assert sum(held) <= 2 * 4 * 1000
    everything = torch.cat(list(masked_magnitudes(model)))
    assert budget.masked_p99 == pytest.approx(everything.quantile(0.99).item(), rel=0.1)


def test_nothing_to_do_for_weights_that_are_cut_already() -> None:
    decay_budget(make_model(CONFIGS["llama"], sparse=True), config(lr=1e-9, steps=1)).check()


def test_schedule_warms_up_and_ends_at_zero() -> None:
    for schedule in ("linear", "cosine"):
        factors = [lr_factor(step, 100, 0.05, schedule) for step in range(101)]
        assert factors[0] > 0
        assert factors[:6] == sorted(factors[:6])
        assert max(factors) == factors[5] == 1
        assert factors[5:] == sorted(factors[5:], reverse=True)
        assert factors[100] == pytest.approx(0, abs=1e-12)


def test_constant_schedule_warms_up_and_stays() -> None:
    factors = [lr_factor(step, 100, 0.05, "constant") for step in range(101)]
    assert factors[:6] == sorted(factors[:6])
    assert set(factors[5:]) == {1.0}
