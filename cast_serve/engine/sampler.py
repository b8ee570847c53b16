"""From logits to the next token, in numpy."""

import numpy as np

from cast_serve.engine.types import SamplingParams, TokenEvent
from conversion.errors import InputError

MOST_LOGPROBS = 100
# Nucleus sampling first sorts only so many of the most likely tokens; they nearly always hold the mass.
_NUCLEUS_CANDIDATES = 1024


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
        mass_V = np.cumsum(weights_V, dtype=np.float64)
        return int(np.searchsorted(mass_V, uniform * mass_V[-1], side="right"))
    wanted = top_p * weights_V.sum(dtype=np.float64)
    for count in (_NUCLEUS_CANDIDATES, len(weights_V)):
        order = _largest(weights_V, count)
        mass = np.cumsum(weights_V[order], dtype=np.float64)
        if mass[-1] >= wanted:
            break
    nucleus = mass[: int(np.searchsorted(mass, wanted)) + 1]
    return int(order[np.searchsorted(nucleus, uniform * nucleus[-1], side="right")])


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, in falling order; equal ones by index."""
    if count == 0:
        return np.empty(0, np.int64)
    if count >= len(values):
        candidates = np.arange(len(values))
    else:
        candidates = np.sort(np.argpartition(values, len(values) - count)[-count:])
    return candidates[np.argsort(-values[candidates], kind="stable")]
