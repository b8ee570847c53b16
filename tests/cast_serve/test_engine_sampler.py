"""Sampling against probabilities computed in float64."""

import numpy as np
import pytest

from cast_serve.engine.sampler import Sampler, draw
from cast_serve.engine.types import SamplingParams


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-9])
@pytest.mark.parametrize("size", [7, 1300])
def test_uniform_numbers_become_the_nucleus_distribution(size: int, top_p: float) -> None:
    weights = np.random.default_rng(0).uniform(0.9, 1.0, size).astype(np.float32)
    order = np.argsort(-weights.astype(np.float64), kind="stable")
    share = weights[order].astype(np.float64) / weights.sum(dtype=np.float64)
    kept = 1 + int(np.sum(np.cumsum(share) < top_p))
    expected = np.zeros(size)
    expected[order[:kept]] = share[:kept] / share[:kept].sum()
    grid = (np.arange(6 * size) + 0.5) / (6 * size)
    found = np.bincount([draw(weights, top_p, u) for u in grid], minlength=size) / len(grid)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.01 / len(grid))


def test_temperature_sharpens_to_greedy() -> None:
    logits = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    best = int(logits.argmax())
    for temperature in (0.0, 1e-9, 1e-3):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=0))
        assert [sampler(logits).token_id for _ in range(5)] == [best] * 5
    hot = Sampler(SamplingParams(temperature=100.0, seed=0))
    assert len({hot(logits).token_id for _ in range(300)}) > 40


def test_logprobs_are_at_temperature_one() -> None:
    logits = np.array([1.0, 3.0, 3.0, -2.0], np.float32)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    event = Sampler(SamplingParams(temperature=0.1, seed=3, logprobs=3))(logits)
    assert event.logprob == pytest.approx(expected[event.token_id], abs=1e-6)
    assert [token for token, _ in event.top_logprobs] == [1, 2, 0]
    assert [value for _, value in event.top_logprobs] == pytest.approx(expected[[1, 2, 0]].tolist(), abs=1e-6)
    assert Sampler(SamplingParams(temperature=0.0, logprobs=0))(logits).top_logprobs == ()


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Sampler(SamplingParams(temperature=0.0))(np.array([0.0, np.nan], np.float32))
