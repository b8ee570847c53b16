"""A run's metrics as one picture of small multiples."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# (title, [(metric, label)], logarithmic). A logarithmic panel leaves zeros out.
_PANELS: list[tuple[str, list[tuple[str, str]], bool]] = [
    ("Loss (nats per token)", [("loss", "loss"), ("ce", "cross entropy"), ("kl", "KL to the dense model")], False),
    ("Mean |masked weight|, should fall", [("masked", "masked")], True),
    ("Mean |kept weight|, should hold", [("kept", "kept")], False),
    ("Mask bits flipped at a refresh, should fall", [("mask_flips", "flips")], False),
    ("Learning rate", [("lr", "lr")], False),
    ("Tokens per second", [("tokens_per_s", "speed")], False),
]


def plot_metrics(metrics: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Draw the lines of metrics.jsonl as a PNG."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    steps = [line["step"] for line in metrics]
    axes: list[Axes] = list(figure.subplots(2, 3, sharex=True).flat)
    for axis, (name, series, logarithmic) in zip(axes, _PANELS, strict=True):
        for metric, label in series:
            values = [line[metric] if line[metric] > 0 or not logarithmic else float("nan") for line in metrics]
            axis.plot(steps, values, label=label, linewidth=1.4, marker="." if len(steps) < 40 else None, markersize=4)
        axis.set_title(name, fontsize=10, loc="left")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, axis.get_ylim()[1] * 1.05)
            axis.ticklabel_format(axis="y", scilimits=(-3, 5))
        if len(series) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[3:]:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=130)
