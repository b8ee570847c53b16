"""From logits to the next token, in numpy."""

import numpy as np

from cast_serve.engine.types import SamplingParams, TokenEvent
from conversion.errors import InputError

MOST_LOGPROBS = 100
# A vocabulary is searched in runs of so many tokens first, then within one: summing runs is fast, running sums are not.
_RUN = 256


def check(params: SamplingParams) -> None:
    """InputError if a parameter is outside its range."""
    if params.max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {params.max_tokens}")
    if not (params.temperature >= 0 and np.isfinite(params.temperature)):
        raise InputError(f"temperature must be a number of at least 0, not {params.temperature}")
    if not 0 < params.top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, not {params.top_p}")
    if params.seed is not None and params.seed < 0:
        raise InputError(f"seed must be at least 0, not {params.seed}")
    if params.logprobs is not None and not 0 <= params.logprobs <= MOST_LOGPROBS:
        raise InputError(f"logprobs must be from 0 to {MOST_LOGPROBS}, not {params.logprobs}")


class Sampler:
    """Chooses the tokens of one request; its randomness is its own, one uniform number per token."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)

    def __call__(self, logits_V: np.ndarray) -> TokenEvent:
        """Choose from float32 logits [V]; ValueError if they are not finite. The event has no finish reason yet."""
        params = self._params
        best = int(logits_V.argmax())
        if not np.isfinite(logits_V[best]):
            raise ValueError("the model's logits are not finite")
        if params.temperature == 0:
            token = best
        else:
            weights_V = np.exp((logits_V - logits_V[best]) / np.float32(max(params.temperature, 1e-6)))
            token = draw(weights_V, params.top_p, self._random.random())
        if params.logprobs is None:
            return TokenEvent(token)
        shifted_V = logits_V - logits_V[best]
        log_total = float(np.log(np.exp(shifted_V).sum(dtype=np.float64)))
        top = _largest(shifted_V, params.logprobs)
        return TokenEvent(
            token,
            logprob=float(shifted_V[token]) - log_total,
            top_logprobs=tuple((int(i), float(shifted_V[i]) - log_total) for i in top),
        )


def draw(weights_V: np.ndarray, top_p: float, uniform: float) -> int:
    """Draw an index in proportion to `weights_V`, among the fewest largest that hold `top_p` of the mass.

    Args:
        weights_V: [V] float32, not negative, with a positive sum.
        uniform: a number in [0, 1), which decides.
    """
    if top_p == 1:
        starts = np.arange(0, len(weights_V), _RUN)
        mass = _running_sum(np.add.reduceat(weights_V, starts))
        run = _first_above(mass, uniform * mass[-1])
        start, before = int(starts[run]), mass[run - 1] if run else 0.0
        return start + _first_above(_running_sum(weights_V[start : start + _RUN]), uniform * mass[-1] - before)
    # Tokens below this weight hold less than 1 - top_p of the mass even together: the nucleus is among the others.
    total = float(weights_V.sum())
    candidates = np.flatnonzero(weights_V >= (1 - top_p) * total / len(weights_V))
    order = candidates[np.argsort(-weights_V[candidates], kind="stable")]
    mass = _running_sum(weights_V[order])
    mass = mass[: int(np.searchsorted(mass, top_p * total)) + 1]
    return int(order[_first_above(mass, uniform * mass[-1])])


def _running_sum(weights: np.ndarray) -> np.ndarray:
    return np.cumsum(weights, dtype=np.float64)


def _first_above(mass: np.ndarray, wanted: float) -> int:
    """First index at which a running sum exceeds `wanted`; if rounding puts that past its end, where it ends."""
    return int(np.searchsorted(mass, min(wanted, np.nextafter(mass[-1], 0)), side="right"))


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, in falling order; equal ones by index."""
    if count == 0:
        return np.empty(0, np.int64)
    if count >= len(values):
        candidates = np.arange(len(values))
    else:
        candidates = np.sort(np.argpartition(values, len(values) - count)[-count:])
    return candidates[np.argsort(-values[candidates], kind="stable")]
