"""The measurements as Markdown and as a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.cpu.results import Measured, Rate, rates, rivals
from benchmarks.markdown import markdown_table
from benchmarks.report.statistics import Spread
from conversion.atomic import write_text

_COLORS = {"dense": "tab:gray", "2:4": "tab:blue", "llama.cpp": "tab:orange"}
_MARKERS = {"fp32": "o", "bf16": "s", "int8": "^", "int4": "D"}


def write(
    found: Sequence[Measured], concurrency: Sequence[int], about: Sequence[str], record: Mapping[str, Any], stem: Path
) -> str:
    """Write stem.json, .md and .png, and return the markdown.

    Args:
        about: the title, and what is to be said below it.
        record: what the JSON says beside the measurements.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    candidates = [asdict(measured) for measured in found]
    write_text(stem.parent / f"{stem.name}.json", json.dumps({**record, "candidates": candidates}, indent=1) + "\n")
    text = markdown(found, concurrency, about, f"{stem.name}.png")
    write_text(stem.parent / f"{stem.name}.md", text)
    plot(found, concurrency, stem.parent / f"{stem.name}.png", about[0])
    return text


def markdown(found: Sequence[Measured], concurrency: Sequence[int], about: Sequence[str], picture: str) -> str:
    """Speed beside quality, ratios, and where 2:4 loses.

    Args:
        found: all candidates; each has a turn for every round.
        concurrency: the levels.
        about: a title, then how it was measured, a paragraph each.
        picture: file name of the plot.
    """
    lines = [f"# {about[0]}", "", f"![tokens/s over quality]({picture})", ""]
    for paragraph in about[1:]:
        lines += [paragraph, ""]
    lines += [_table(found, concurrency), ""]
    if any(m.family == "2:4" for m in found):
        lines += [*_ratios(found, rates(concurrency)), "", *_losses(found, rates(concurrency))]
    return "\n".join(lines) + "\n"


def plot(found: Sequence[Measured], concurrency: Sequence[int], path: Path, title: str) -> None:
    """Tokens/s over perplexity, or over bytes where no text was scored; a panel for the lowest and highest level."""
    shown = sorted({concurrency[0], concurrency[-1]})
    figure = Figure(figsize=(6.2 * len(shown), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axis, users in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        _panel(axis, found, users)
    present = [m.family for m in found], [m.values for m in found]
    legend = [Line2D([], [], marker="o", linestyle="", color=c, label=f) for f, c in _COLORS.items() if f in present[0]]
    legend += [
        Line2D([], [], marker=marker, linestyle="", color="black", markerfacecolor="none", label=values)
        for values, marker in _MARKERS.items()
        if values in present[1]
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _panel(axis: Axes, found: Sequence[Measured], users: int) -> None:
    scored = all(m.perplexity is not None for m in found)
    points = [(m.perplexity or m.weight_bytes / 1e6, median(m.speed(users)), m) for m in found]
    best: dict[tuple[str, str], float] = {}
    for _, speed, m in points:
        best[m.family, m.values] = max(speed, best.get((m.family, m.values), 0))
    for x, speed, m in points:
        leads = speed == best[m.family, m.values]
        axis.plot(x, speed, _MARKERS[m.values], color=_COLORS[m.family], markersize=8, alpha=1 if leads else 0.4)
        if leads:
            label = m.name.split(",")[0]
            axis.annotate(label, (x, speed), (6, 5), textcoords="offset points", fontsize=8, color=_COLORS[m.family])
    axis.set_title(f"{users} at once" if users > 1 else "one request", fontsize=10, loc="left")
    axis.set_xlabel("perplexity (better to the left)" if scored else "weights on disk, MB")
    axis.set_ylabel("output tokens/s, end to end")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:.4g}")
    axis.xaxis.set_minor_formatter("{x:.4g}")
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.set_ylim(bottom=0)
    axis.margins(x=0.18, y=0.12)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _table(found: Sequence[Measured], concurrency: Sequence[int]) -> str:
    scored = any(m.perplexity is not None for m in found)
    levels = [f"tokens/s, {users} at once" for users in concurrency]
    decoding = [f"decoding only, {users}" for users in (concurrency[0], concurrency[-1])]
    weighed = any(m.weight_memory is not None for m in found)
    memory = [*(["weights resident"] if weighed else []), "peak memory"]
    heads = ["", *(["perplexity"] if scored else []), "on disk", *memory, *levels, *decoding, "prefill tokens/s"]
    rows = []
    for m in found:
        quality = [] if not scored else ["" if m.perplexity is None else f"{m.perplexity:.2f}"]
        cells = [
            m.name,
            *quality,
            f"{m.weight_bytes / 1e6:.0f} MB",
            *([f"{(m.weight_memory or 0) / 1e6:.0f} MB"] if weighed else []),
            f"{m.peak_memory / 1e6:.0f} MB",
            *(_spread(m.speed(users)) for users in concurrency),
            *(f"{median(m.decoding(users)):.0f}" for users in (concurrency[0], concurrency[-1])),
            _spread(m.prefill()),
        ]
        rows.append(cells)
    return markdown_table(heads, rows)


def _spread(values: list[float]) -> str:
    return f"{_figure(median(values))} ({_figure(min(values))}–{_figure(max(values))})"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})"


def _ratios(found: Sequence[Measured], by_name: dict[str, Rate]) -> list[str]:
    others = rivals(found)
    rows = [
        [m.name, *(", ".join(_ratio(rival.ratio(m, rate)) for rate in by_name.values()) for rival in others)]
        for m in found
        if m.family == "2:4"
    ]
    return [
        f"How many times as fast 2:4 is as the fastest of each kind: {', '.join(by_name)} (round against round, the "
        "median and lowest–highest).",
        "",
        markdown_table(["", *(rival.name for rival in others)], rows),
    ]


def _losses(found: Sequence[Measured], by_name: dict[str, Rate]) -> list[str]:
    lines = ["Where 2:4 loses, in speed in every round:", ""]
    for m in (m for m in found if m.family == "2:4"):
        slower = []
        for rival in rivals(found):
            lost = {name: rival.ratio(m, rate) for name, rate in by_name.items()}
            lost = {name: ratio for name, ratio in lost.items() if ratio.verdict(higher_is_better=True) == "worse"}
            if lost:
                slower.append(f"{rival.name} ({', '.join(f'{name} {_ratio(ratio)}' for name, ratio in lost.items())})")
        dense = [o for o in found if o.family != "2:4"]
        losses = [f"slower than {' and '.join(slower)}"] if slower else []
        if m.perplexity is not None:
            better = [o for o in dense if o.perplexity is not None and o.perplexity < m.perplexity]
            losses += _named("perplexity is higher than of", better, len(dense))
            smaller = [o for o in better if o.weight_bytes <= m.weight_bytes]
            losses += _named("both larger and of higher perplexity than", smaller, len(dense))
        losses += _named("takes more memory than", [o for o in dense if o.peak_memory < m.peak_memory], len(dense))
        lines.append(f"- {m.name}: {'; '.join(losses) if losses else 'nowhere here'}")
    return lines


def _named(what: str, others: Sequence[Measured], of: int) -> list[str]:
    """By name as far as names can be read: the table above has the rest."""
    if not others:
        return []
    few = " and ".join(other.name for other in others) if len(others) <= 3 else f"{len(others)} of {of} others"
    return [f"{what} {'all others' if len(others) == of else few}"]
