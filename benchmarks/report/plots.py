"""The report's plots, as SVG elements to stand inside its HTML."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.load.measurements import ROLES, BenchResult, Role
from benchmarks.report.statistics import METRICS, Metric, Ratio, percentiles, resident_bytes, throughput, values

COLORS: dict[Role, str] = {"dense": "#8a94a6", "sparse": "#0b7a75"}
VERDICT_COLORS = {"better": "#0b7a75", "worse": "#c2410c", "even": "#8a94a6"}
INK, RULE = "#1f2933", "#d9dee6"

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eef1f5",
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small, sharp, selectable
}


def throughput_plot(result: BenchResult) -> str:
    """Tokens a second over concurrency: median of the rounds, with the range they span."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        concurrencies = result.settings.concurrencies
        for role in ROLES:
            spreads = [throughput(result, role, c) for c in concurrencies]
            medians = [spread.median for spread in spreads]
            below = [spread.median - spread.low for spread in spreads]
            above = [spread.high - spread.median for spread in spreads]
            axes.errorbar(
                concurrencies, medians, yerr=[below, above], color=COLORS[role], marker="o", capsize=3, label=role
            )
        axes.set(xticks=concurrencies, xlabel="concurrent requests", ylabel="generated tokens/s")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.1)
        axes.set_title("Throughput")
        axes.legend(loc="upper left")

    return _svg("throughput", (5.4, 3.4), draw)


def ratio_plot(all_ratios: Sequence[Ratio]) -> str:
    """Every ratio sparse/dense as a point with the range of the rounds, around the line of no difference."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        labels = []
        for row, ratio in enumerate(all_ratios):
            spread, color = ratio.spread, VERDICT_COLORS[ratio.verdict]
            axes.plot(
                [spread.low, spread.high], [row, row], color=color, linewidth=3, solid_capstyle="round", alpha=0.4
            )
            axes.plot(spread.median, row, "o", color=color)
            axes.annotate(
                f"{spread.median:.2f}",
                (spread.high, row),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontweight="bold",
            )
            labels.append(f"{ratio.name}, {ratio.concurrency} at once")
        axes.axvline(1, color=INK, linewidth=1)
        axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel="sparse / dense")
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
        axes.set_title("Sparse relative to dense")

    return _svg("ratios", (5.4, 1.1 + 0.27 * len(all_ratios)), draw)


def latency_plot(result: BenchResult, metric: Metric) -> str:
    """Median, p90 and p99 of one latency for each concurrency."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        concurrencies = result.settings.concurrencies
        width = 0.36
        for offset, role in zip((-width / 2, width / 2), ROLES, strict=True):
            found = [percentiles(values(result.levels_of(role, c), metric)) for c in concurrencies]
            places = [i + offset for i in range(len(concurrencies))]
            p50 = [1000 * each[50] for each in found]
            axes.bar(places, p50, width * 0.92, color=COLORS[role], label=role)
            for place, each in zip(places, found, strict=True):
                axes.plot([place, place], [1000 * each[50], 1000 * each[99]], color=INK, linewidth=1)
                axes.plot([place], [1000 * each[90]], "_", color=INK, markersize=9)
                axes.plot([place], [1000 * each[99]], "_", color=INK, markersize=5)
        axes.set(xticks=range(len(concurrencies)), xticklabels=concurrencies, xlabel="concurrent requests", ylabel="ms")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.3)  # room for the legend
        axes.set_ylim(bottom=0)
        axes.set_title(metric.name)
        axes.legend(loc="upper left")

    return _svg(metric.key, (3.5, 3.0), draw)


def memory_plot(result: BenchResult) -> str:
    """Weights, and resident memory at each concurrency, in MB."""
    quantities: list[tuple[str, Callable[[Role], int]]] = [
        ("weights on disk", lambda role: result.models[role].disk_bytes),
        *(
            (f"resident, {c} at once", lambda role, c=c: resident_bytes(result, role, c))
            for c in result.settings.concurrencies
        ),
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        height = 0.36
        for offset, role in zip((-height / 2, height / 2), ROLES, strict=True):
            megabytes = [quantity(role) / 1e6 for _, quantity in quantities]
            bars = axes.barh(
                [row + offset for row in range(len(quantities))],
                megabytes,
                height * 0.92,
                color=COLORS[role],
                label=role,
            )
            axes.bar_label(bars, fmt="%.0f", padding=4, color=COLORS[role], fontweight="bold")
        axes.set(yticks=range(len(quantities)), yticklabels=[name for name, _ in quantities], xlabel="MB")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)

    return _svg("memory", (5.4, 2.9), draw)


def latency_plots(result: BenchResult) -> list[str]:
    return [latency_plot(result, metric) for metric in METRICS]


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw into a figure of `size` inches; identifiers are salted with `name`, so that plots can share a page."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    element = buffer.getvalue()
    element = element[element.index("<svg") :]
    # figure_1, axes_1, ... are the same in every plot
    return re.sub(
        r'id="(figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend)_', rf'id="{name}_\1_', element
    )
