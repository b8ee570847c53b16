"""`cast scaling-law`: loss of sparse models as a power law of size and training tokens, fitted to finished runs.

L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., arXiv:2203.15556, Eq. 2; CAST fits sparse models alike), or
L(D) = E + B / D^beta where all runs are of one size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import least_squares

from conversion.errors import InputError

# Hoffmann et al., approach 3: residuals of log loss beyond this count linearly, so a bad run does not bend the law.
HUBER_DELTA = 1e-3
BOOTSTRAPS = 200
_EXPONENTS = (0.2, 0.5, 1.0)  # starts of alpha and beta
_IRREDUCIBLE = (0.3, 0.7, 0.95)  # starts of E, as parts of the least loss
_LARGEST_EXPONENT = 3.0


class RunRecord(BaseModel):
    """One finished run: the least that a scaling law needs.

    Attributes:
        name: of the run.
        parameters: of the whole model.
        tokens: trained on.
        loss: held-out cross entropy in nats per token, log(perplexity); the same text for all runs.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    parameters: float = Field(gt=0)
    tokens: float = Field(gt=0)
    loss: float = Field(gt=0)


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = irreducible + size_factor / N^alpha + token_factor / D^beta.

    Attributes:
        irreducible: E, in nats per token.
        size_factor: A; 0 where all runs are of one size, whose share E then includes.
        alpha: exponent of N; 0 likewise.
        token_factor: B.
        beta: exponent of D.
    """

    irreducible: float
    size_factor: float
    alpha: float
    token_factor: float
    beta: float

    def limit(self, parameters: float) -> float:
        """The loss that no number of tokens goes below, in nats per token."""
        return self.irreducible + (self.size_factor * parameters**-self.alpha if self.size_factor else 0.0)

    def loss(self, parameters: float, tokens: float) -> float:
        """L(N, D), in nats per token."""
        return self.limit(parameters) + self.token_factor * tokens**-self.beta

    def tokens_for(self, parameters: float, loss: float) -> float:
        """D at which a model of this size reaches `loss`; infinity if the law never does."""
        left = loss - self.limit(parameters)
        if left <= 0 or not self.beta:
            return math.inf
        exponent = math.log(self.token_factor / left) / self.beta
        return math.exp(exponent) if exponent < 700 else math.inf


@dataclass(frozen=True)
class Interval:
    """A value with the 5th and 95th percentile of its bootstraps."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A fitted law with what is known of its uncertainty.

    Attributes:
        records: what it was fitted to.
        law: the best fit.
        bootstraps: laws fitted to the best fit's predictions with noise as large as its residuals.
        heldout: the run of most compute (N * D), and what a law fitted to all others predicts for it; None where the
            others are too few.
    """

    records: list[RunRecord]
    law: ScalingLaw
    bootstraps: list[ScalingLaw]
    heldout: tuple[RunRecord, float] | None

    @property
    def heldout_error(self) -> float | None:
        """Relative error of the held-out run's predicted loss."""
        return None if self.heldout is None else self.heldout[1] / self.heldout[0].loss - 1

    def loss(self, parameters: float, tokens: float) -> Interval:
        """L(N, D) with its confidence interval."""
        return _interval(self.law.loss(parameters, tokens), [b.loss(parameters, tokens) for b in self.bootstraps])

    def tokens_for(self, parameters: float, loss: float) -> Interval:
        """Tokens with which a model of this size reaches `loss`; infinity where the fit never does."""
        return _interval(
            self.law.tokens_for(parameters, loss), [b.tokens_for(parameters, loss) for b in self.bootstraps]
        )


def fit_scaling_law(records: Sequence[RunRecord], *, bootstraps: int = BOOTSTRAPS, seed: int = 0) -> Fit:
    """Fit the law by least squares of log loss with Huber's loss, from several starts.

    Confidence comes from a parametric bootstrap: losses predicted by the best fit, with normal noise in log loss,
    fitted again. Few residuals hardly show how large that noise is, so each bootstrap draws its size from what they
    leave possible, spread * sqrt(df / chi2(df)); one size for all would give bands of normal quantiles where Student's
    are due. (Residuals drawn anew would not do: a fit this robust goes right through as many runs as it has constants.)
    The held-out error leaves the largest run out.

    Raises:
        InputError: fewer runs, sizes or token counts than the law has constants for.
    """
    records = sorted(records, key=lambda record: (record.parameters, record.tokens))
    check_enough(records)
    law = _fit(records, _starts(records))
    degrees = len(records) - _constants(records)
    squares = sum(math.log(record.loss / law.loss(record.parameters, record.tokens)) ** 2 for record in records)
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(bootstraps):
        spread = math.sqrt(squares / generator.chisquare(degrees))
        drawn = generator.normal(0.0, spread, len(records))
        again = [
            replace_loss(record, law.loss(record.parameters, record.tokens) * math.exp(noise))
            for record, noise in zip(records, drawn, strict=True)
        ]
        resampled.append(_fit(again, [law]))
    return Fit(records, law, resampled, _hold_out(records))


def replace_loss(record: RunRecord, loss: float) -> RunRecord:
    """The same run with another loss."""
    return record.model_copy(update={"loss": loss})


def check_enough(records: Sequence[RunRecord]) -> None:
    """InputError unless there are more runs than constants, and three values of each axis that varies."""
    sizes, budgets = ({getattr(record, axis) for record in records} for axis in ("parameters", "tokens"))
    if len(sizes) == 2:
        raise InputError("runs of two model sizes do not determine how loss falls with size: give runs of one, or of 3")
    if len(budgets) < 3:
        raise InputError(f"different token counts of the runs: {len(budgets)}, and the law needs 3: train more")
    needed = _constants(records) + 1
    if len(records) < needed:
        raise InputError(f"{len(records)} runs are too few for the {needed - 1} constants of the law: give {needed}")


def _constants(records: Sequence[RunRecord]) -> int:
    return 5 if len({record.parameters for record in records}) > 1 else 3


def _hold_out(records: Sequence[RunRecord]) -> tuple[RunRecord, float] | None:
    largest = max(records, key=lambda record: record.parameters * record.tokens)
    others = [record for record in records if record is not largest]
    try:
        check_enough(others)
    except InputError:
        return None
    law = _fit(others, _starts(others))
    return largest, law.loss(largest.parameters, largest.tokens)


def _starts(records: Sequence[RunRecord]) -> list[ScalingLaw]:
    """Laws that share what is above E between the two terms, for several E and exponents."""
    least = min(record.loss for record in records)
    middle = math.exp(np.mean([math.log(record.parameters) for record in records]))
    budget = math.exp(np.mean([math.log(record.tokens) for record in records]))
    above = float(np.mean([record.loss for record in records]))
    sized = _constants(records) == 5
    starts = []
    for part in _IRREDUCIBLE:
        share = (above - part * least) / (2 if sized else 1)
        for beta in _EXPONENTS:
            for alpha in _EXPONENTS if sized else (0.0,):
                factor = share * middle**alpha if sized else 0.0
                starts.append(ScalingLaw(part * least, factor, alpha, share * budget**beta, beta))
    return starts


def _fit(records: Sequence[RunRecord], starts: Sequence[ScalingLaw]) -> ScalingLaw:
    """The law of least Huber loss over the starts.

    Fitted are log E, and each term's log at the mean of log N or log D with its exponent, which decorrelates them.
    """
    log_n = np.log([record.parameters for record in records])
    log_d = np.log([record.tokens for record in records])
    log_loss = np.log([record.loss for record in records])
    mean_n, mean_d = log_n.mean(), log_d.mean()
    sized = _constants(records) == 5

    def residuals(x: np.ndarray) -> np.ndarray:
        predicted = np.exp(x[0]) + np.exp(x[1] - x[2] * (log_d - mean_d))
        if sized:
            predicted = predicted + np.exp(x[3] - x[4] * (log_n - mean_n))
        return np.log(predicted) - log_loss

    low, high = [-20.0, -20.0, 0.0], [5.0, 10.0, _LARGEST_EXPONENT]
    if sized:
        low, high = low + low[1:], high + high[1:]
    best = None
    for start in starts:
        x = [math.log(start.irreducible), math.log(start.token_factor) - start.beta * mean_d, start.beta]
        if sized:
            x += [math.log(start.size_factor) - start.alpha * mean_n, start.alpha]
        inside = np.clip(x, np.array(low) + 1e-6, np.array(high) - 1e-6)
        found = least_squares(residuals, inside, bounds=(low, high), loss="huber", f_scale=HUBER_DELTA)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    x = best.x
    law = ScalingLaw(math.exp(x[0]), 0.0, 0.0, math.exp(x[1] + x[2] * mean_d), float(x[2]))
    return replace(law, size_factor=math.exp(x[3] + x[4] * mean_n), alpha=float(x[4])) if sized else law


def _interval(value: float, others: Sequence[float]) -> Interval:
    """Percentiles by rank, so that infinities count as the largest."""
    ranked = sorted(others)
    low, high = (ranked[round(part * (len(ranked) - 1))] for part in (0.05, 0.95))
    return Interval(value, low, high)
