"""The one table at the end of `cast bench` and `cast pipeline`."""

from rich.table import Table

from benchmarks.load.measurements import ROLES, BenchResult
from benchmarks.report.quality import Quality
from benchmarks.report.statistics import (
    METRICS,
    Ratio,
    percentiles,
    ratios,
    resident_bytes,
    throughput,
    values,
)

COLORS = {"better": "green", "worse": "red", "even": "dim"}


def summary_table(result: BenchResult, quality: Quality | None = None) -> Table:
    """Quality, size, memory and speed of the dense and the sparse model, one row each."""
    table = Table(title="2:4 sparse against dense", title_justify="left", header_style="bold")
    for heading in ("", "dense", "sparse", "sparse / dense"):
        table.add_column(heading, justify="left" if not heading else "right")
    if quality is not None:
        _add_quality(table, quality)
    models = result.models
    _add_size(table, "weights on disk", models["dense"].disk_bytes, models["sparse"].disk_bytes)
    for concurrency in result.settings.concurrencies:
        table.add_section()
        found = {ratio.name: ratio for ratio in ratios(result, concurrency)}
        speeds = [f"{throughput(result, role, concurrency).median:.1f}" for role in ROLES]
        table.add_row(f"tokens/s, {concurrency} at once", *speeds, _ratio(found["tokens/s"]))
        for metric in METRICS:
            medians = [percentiles(values(result.levels_of(role, concurrency), metric))[50] for role in ROLES]
            cells = [f"{1000 * median:,.1f} ms" for median in medians]
            table.add_row(f"{metric.name} p50", *cells, _ratio(found.get(metric.name)))
        _add_size(table, "resident memory", *(resident_bytes(result, role, concurrency) for role in ROLES))
    return table


def _add_quality(table: Table, quality: Quality) -> None:
    reference = next(iter(quality.models.values())).perplexity
    for index, (name, model) in enumerate(quality.models.items()):
        perplexity = f"{model.perplexity:,.2f}"
        cells = (perplexity, "", "") if index == 0 else ("", perplexity, f"{model.perplexity / reference:,.2f}")
        table.add_row(f"perplexity, {name}", *cells)
    table.add_section()


def _add_size(table: Table, name: str, dense: int, sparse: int) -> None:
    color = "green" if sparse < dense else "red" if sparse > dense else "dim"
    table.add_row(name, _mb(dense), _mb(sparse), f"[{color}]{sparse / dense:.2f}[/]" if dense else "")


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    spread = ratio.spread
    return f"[{COLORS[ratio.verdict]}]{spread.median:.2f}[/] ({spread.low:.2f}–{spread.high:.2f})"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
