"""report.html: one self-contained page."""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from benchmarks.load.measurements import ROLES, BenchResult, Round
from benchmarks.report import statistics
from benchmarks.report.plots import latency_plots, memory_plot, ratio_plot, throughput_plot
from benchmarks.report.quality import Quality
from conversion.atomic import write_text
from conversion.errors import InputError


def render(result: BenchResult, quality: Quality | None = None, training_curve: Path | None = None) -> str:
    """Return the page as HTML that loads nothing from anywhere. InputError if `training_curve` is no PNG file."""
    environment = Environment(
        loader=PackageLoader("benchmarks.report", "."),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": _ms, "mb": _mb, "fixed": _fixed, "span": _span}
    concurrencies = result.settings.concurrencies
    ratios = {c: statistics.ratios(result, c) for c in concurrencies}
    return environment.get_template("template.html").render(
        result=result,
        roles=ROLES,
        metrics=statistics.METRICS,
        percentiles=statistics.percentiles,
        values=statistics.values,
        throughput=statistics.throughput,
        errors={role: statistics.errors(result, role) for role in ROLES},
        resident={c: {role: statistics.resident_bytes(result, role, c) for role in ROLES} for c in concurrencies},
        ratios=ratios,
        losses=[ratio for found in ratios.values() for ratio in found if ratio.verdict == "worse"],
        quality=quality,
        training_curve=_data_uri(training_curve) if training_curve else None,
        throughput_plot=throughput_plot(result),
        ratio_plot=ratio_plot([ratio for found in ratios.values() for ratio in found]),
        latency_plots=latency_plots(result),
        memory_plot=memory_plot(result),
    )


def write_report(
    result: BenchResult, out: Path, quality: Quality | None = None, training_curve: Path | None = None
) -> Path:
    """Write bench.json and report.html into `out`, each whole or not at all; return the page's path."""
    write_text(out / "bench.json", json.dumps(result.model_dump(mode="json"), indent=1))  # first: it took long
    write_text(out / "report.html", render(result, quality, training_curve))
    return out / "report.html"


def read_png(path: Path) -> bytes:
    """The content of a PNG file; InputError if it is none."""
    if not path.is_file() or not (content := path.read_bytes()).startswith(b"\x89PNG"):
        raise InputError(f"{path} is no PNG file: give the training curve that `cast train` drew")
    return content


def _data_uri(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(read_png(png)).decode()


def _fixed(number: float, digits: int) -> str:
    return "–" if math.isnan(number) else f"{number:,.{digits}f}"


def _span(rounds: Sequence[Round], quantity: str) -> str:
    numbers = [getattr(round_, quantity) for round_ in rounds]
    return f"{min(numbers):.2f}–{max(numbers):.2f}"


def _ms(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return _fixed(milliseconds, 1 if milliseconds < 100 else 0)


def _mb(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.1f}"
