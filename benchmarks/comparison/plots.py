"""Pictures of a study."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from benchmarks.comparison.report import Record, dense_record, perplexity


def plot_budgets(records: Sequence[Record], path: Path, title: str) -> None:
    """Perplexity over training tokens, a panel for each text; what is not trained is a horizontal line."""
    good = [record for record in records if "failed" not in record]
    texts = list(good[0]["texts"])
    figure, axes = _panels(len(texts), title)
    trained = [record for record in good if record["tokens"] is not None]
    names = list(dict.fromkeys(record["variant"] for record in trained))
    worst = {text: max((perplexity(record, text) for record in trained), default=None) for text in texts}
    for axis, text in zip(axes, texts, strict=True):
        for name in names:
            points = sorted((r["tokens"], perplexity(r, text)) for r in trained if r["variant"] == name)
            look: dict[str, Any] = {"linewidth": 1.4, "linestyle": "--" if name.startswith("cast-") else "-"}
            if name == "cast":
                look |= {"linewidth": 2.4, "color": "black", "zorder": 5}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **look)
        dense = dense_record(good)
        for record in good:
            value, limit = perplexity(record, text), worst[text]
            if record["tokens"] is not None or (limit is not None and value > 3 * limit):
                continue  # one-shot magnitude would squeeze all others together
            style = "-" if record is dense else ":"
            axis.axhline(value, linestyle=style, color="grey", linewidth=1)
            place: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "fontsize": 8,
                "ha": "right",
                "va": "bottom",
            }
            axis.annotate(record["variant"], (1, value), **place)
        axis.set_xscale("log")
        axis.set_xticks(sorted({record["tokens"] for record in trained}))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:.4g}")
        axis.yaxis.set_minor_formatter("{x:.4g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(f"Perplexity on {text}", fontsize=10, loc="left")
        axis.set_xlabel("training tokens")
    if names:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def plot_sweep(records: Sequence[Record], swept: dict[str, list[Any]], path: Path, title: str) -> None:
    """Perplexity on the first text over each swept setting; a line for each combination of the others."""
    good = [record for record in records if "failed" not in record]
    figure, axes = _panels(len(swept), title)
    text = next(iter(good[0]["texts"]))
    for axis, (name, values) in zip(axes, swept.items(), strict=True):
        others = [other for other in swept if other != name]
        lines: dict[str, list[tuple[int, float]]] = {}
        for record in good:
            label = ", ".join(f"{other} {record['config'][other]}" for other in others)
            lines.setdefault(label, []).append((values.index(record["config"][name]), perplexity(record, text)))
        for label, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linewidth=1.4, label=label)
        axis.set_xticks(range(len(values)), [str(value) for value in values])
        axis.set_title(f"Perplexity on {text} over {name}", fontsize=10, loc="left")
        if others and len(lines) <= 12:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.5 * count, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes: list[Axes] = list(figure.subplots(1, count, squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
