"""What `cast scaling-law` prints and writes: the fit as text, JSON and a plot."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from cast_train.scaling_law import Fit, Interval, RunRecord
from conversion.atomic import new_directory


def write_report(fit: Fit, dense: dict[float, float], out: Path, *, overwrite: bool = False) -> str:
    """Write scaling-law.json and scaling-law.png to the new directory `out`; return the summary as text."""
    with new_directory(out, overwrite) as building:
        (building / "scaling-law.json").write_text(json.dumps(as_dict(fit, dense), indent=1) + "\n")
        plot_fit(fit, dense, building / "scaling-law.png")
    return summary(fit, dense)


def summary(fit: Fit, dense: dict[float, float]) -> str:
    """The law with 90 % intervals, its error on the largest run, and the tokens that match each dense model."""
    law = fit.law
    size = f" + {law.size_factor:.4g} / N^{law.alpha:.3f}" if law.size_factor else ""
    shape = "N, D" if size else "D"
    lines = [
        f"loss L({shape}) = {law.irreducible:.4f}{size} + {law.token_factor:.4g} / D^{law.beta:.3f} nats per token, "
        f"from {len(fit.records)} runs",
        "90 % intervals: " + ", ".join(f"{name} {_range(value)}" for name, value in constants(fit).items()),
    ]
    if fit.heldout is None or fit.heldout_error is None:
        lines.append("too few runs to leave the largest one out: how well it predicts was not tested")
    else:
        run, predicted = fit.heldout
        lines.append(
            f"left out, {run.name} ({run.tokens:.3g} tokens): perplexity {math.exp(predicted):.2f} predicted, "
            f"{math.exp(run.loss):.2f} measured ({fit.heldout_error:+.2%} in loss)"
        )
    for parameters, loss in sorted(dense.items()):
        lines.append(_match(fit, parameters, loss))
    return "\n".join(lines)


def _match(fit: Fit, parameters: float, loss: float) -> str:
    needed = fit.tokens_for(parameters, loss)
    what = f"dense perplexity {math.exp(loss):.2f} at {parameters:.3g} parameters"
    limit = f"the law's limit there is {math.exp(fit.law.limit(parameters)):.2f}"
    if math.isinf(needed.value):
        reached = sum(math.isfinite(law.tokens_for(parameters, loss)) for law in fit.bootstraps)
        return f"{what}: not reachable by this fit, {limit} ({reached} of {len(fit.bootstraps)} bootstraps reach it)"
    return f"{what}: {needed.value:.3g} tokens to match it (90 %: {_range(needed)})"


def constants(fit: Fit) -> dict[str, Interval]:
    """The law's constants, by the names of the formula, with their intervals."""
    names = {"E": "irreducible", "B": "token_factor", "beta": "beta"}
    if fit.law.size_factor:
        names |= {"A": "size_factor", "alpha": "alpha"}
    found = {}
    for name, attribute in names.items():
        low, high = np.percentile([getattr(law, attribute) for law in fit.bootstraps], [5, 95])
        found[name] = Interval(getattr(fit.law, attribute), float(low), float(high))
    return found


def _range(interval: Interval) -> str:
    high = "never" if math.isinf(interval.high) else f"{interval.high:.3g}"
    low = "never" if math.isinf(interval.low) else f"{interval.low:.3g}"
    return f"{low} to {high}"


def as_dict(fit: Fit, dense: dict[float, float]) -> dict[str, Any]:
    """JSON of the fit; infinite token counts are null."""
    heldout = None
    if fit.heldout is not None:
        heldout = {"run": fit.heldout[0].name, "loss": fit.heldout[0].loss, "predicted_loss": fit.heldout[1]}
    return {
        "law": {name: asdict(interval) for name, interval in constants(fit).items()},
        "runs": [record.model_dump() for record in fit.records],
        "heldout": heldout and heldout | {"relative_error": fit.heldout_error},
        "match_dense": [
            {
                "parameters": parameters,
                "dense_loss": loss,
                "limit": fit.law.limit(parameters),
                "tokens": {
                    name: value if math.isfinite(value) else None
                    for name, value in asdict(fit.tokens_for(parameters, loss)).items()
                },
            }
            for parameters, loss in sorted(dense.items())
        ],
    }


def plot_fit(fit: Fit, dense: dict[float, float], path: Path) -> None:
    """Perplexity over training tokens, one curve a size, with its 90 % band, the runs, and the dense models."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    by_size: dict[float, list[RunRecord]] = {}
    for record in fit.records:
        by_size.setdefault(record.parameters, []).append(record)
    size = EngFormatter(sep="", places=1)
    most = max(record.tokens for record in fit.records)
    tokens = np.geomspace(min(record.tokens for record in fit.records) / 2, most * 10, 80)
    for index, (parameters, runs) in enumerate(by_size.items()):
        color = f"C{index}"
        curve = [fit.loss(parameters, float(count)) for count in tokens]
        axis.plot(tokens, np.exp([point.value for point in curve]), color=color, label=f"{size(parameters)} parameters")
        axis.fill_between(
            tokens, np.exp([p.low for p in curve]), np.exp([p.high for p in curve]), color=color, alpha=0.2, linewidth=0
        )
        axis.plot([run.tokens for run in runs], np.exp([run.loss for run in runs]), "o", color=color, markersize=5)
        if parameters in dense:
            axis.axhline(math.exp(dense[parameters]), color=color, linestyle=":", linewidth=1)
    axis.axvspan(most, tokens[-1], color="gray", alpha=0.08, linewidth=0)
    axis.set_xlim(tokens[0], tokens[-1])
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_formatter("{x:.4g}")
    axis.yaxis.set_minor_formatter("{x:.4g}")
    axis.set_xlabel("training tokens (shaded: beyond the runs)")
    axis.set_ylabel("held-out perplexity (dotted: dense)")
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
