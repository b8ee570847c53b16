"""The records of a study as markdown and JSON."""

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.comparison.variants import DENSE
from benchmarks.markdown import markdown_table
from conversion.atomic import write_text

Record = dict[str, Any]


def write_json(records: Sequence[Record], about: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps({**about, "cells": list(records)}, indent=1) + "\n")


def write_markdown(records: Sequence[Record], about: dict[str, Any], path: Path, plot: str | None) -> None:
    """One table of perplexity over budgets, and one of everything else at the largest budget of each method."""
    good = [record for record in records if "failed" not in record]
    texts = list(good[0]["texts"]) if good else []
    parts = [f"# 2:4 methods at equal tokens: {about['model']}", _conditions(about, good)]
    for text in texts:
        parts.append(f"## Perplexity on {text}\n\n{_perplexities(records, text)}")
    if plot is not None:
        parts.append(
            f"![perplexity over training tokens]({plot})\n\nEvery point is a run of its own: ramp and learning rate "
            "depend on how long a run is to be, so a point on the way of a longer run would be another method."
        )
    parts += [f"## In full, each method at its largest budget\n\n{_details(good)}", _settings(good)]
    if failed := [record for record in records if "failed" in record]:
        lines = [f"- {record['variant']}, {_budget(record)}: {record['failed']}" for record in failed]
        parts.append("## Failed\n\n" + "\n".join(lines))
    write_text(path, "\n\n".join(parts) + "\n")


def dense_record(records: Sequence[Record]) -> Record | None:
    return next((record for record in records if record["variant"] == DENSE and "failed" not in record), None)


def perplexity(record: Record, text: str) -> float:
    return record["texts"][text]["perplexity"]


def _conditions(about: dict[str, Any], records: Sequence[Record]) -> str:
    lines = [f"{about['date']}, {about['device']}; {', '.join(f'{k} {v}' for k, v in about['versions'].items())}."]
    # a corpus of the same name need not be the same: what could not be fetched is left out of it
    sizes = {record["training"]["text_tokens"] for record in records if "text_tokens" in record.get("training", {})}
    size = "".join(f", {size:,} tokens" for size in sorted(sizes))
    lines.append(f"Training text: {', '.join(about['data'])}{size}.")
    if records:
        scores = records[0]["texts"]
        windows = (f"{name}: {s['tokens']:,} tokens in windows of {s['context']}" for name, s in scores.items())
        lines.append(f"Held-out text: {'; '.join(windows)}.")
    if about.get("zero_shot"):
        limit = about["zero_shot"]["limit"]
        lines.append(f"Zero-shot: plain acc of lm-eval, {'all' if limit is None else f'the first {limit}'} items.")
    return "\n".join(lines)


def _perplexities(records: Sequence[Record], text: str) -> str:
    budgets = sorted({record["tokens"] for record in records if record["tokens"] is not None})
    good = [record for record in records if "failed" not in record]
    dense = dense_record(records)
    best = {
        budget: min((perplexity(r, text) for r in good if r["tokens"] == budget), default=None) for budget in budgets
    }

    def cell(name: str, budget: int) -> str:
        for record in records:
            if record["variant"] == name and record["tokens"] in (budget, None):
                if "failed" in record:
                    return "failed"
                value = perplexity(record, text)
                ratio = f" ({value / perplexity(dense, text):.3f}x)" if dense is not None else ""
                return f"**{value:.2f}**{ratio}" if value == best[budget] else f"{value:.2f}{ratio}"
        return ""

    if not budgets:
        return markdown_table(["method", "perplexity"], [[r["variant"], f"{perplexity(r, text):.2f}"] for r in good])
    header = ["method", *(f"{budget:,} tokens" for budget in budgets)]
    names = dict.fromkeys(record["variant"] for record in records)
    table = markdown_table(header, [[name, *(cell(name, budget) for budget in budgets)] for name in names])
    return f"{table}\n\nIn brackets: times the dense model's. Bold: the best trained method at this budget."


def _details(records: Sequence[Record]) -> str:
    largest: dict[str, Record] = {}
    for record in records:
        if record["tokens"] is None or record["tokens"] >= (largest.get(record["variant"], record)["tokens"] or 0):
            largest[record["variant"]] = record
    texts = list(records[0]["texts"]) if records else []
    tasks = list(next((r["zero_shot"]["tasks"] for r in records if "zero_shot" in r), {}))
    header = ["method", "tokens", *texts, "KL to dense", "top-1 agreement"]
    header += [*tasks, "mean acc"] if tasks else []
    header += ["cross entropy before, after the cut", "training time"]
    rows = []
    for record in largest.values():
        first = record["texts"][texts[0]]
        row = [record["variant"], _budget(record), *(f"{perplexity(record, text):.2f}" for text in texts)]
        row += [f"{first['kl']:.4f}" if "kl" in first else "", f"{first['top1']:.2%}" if "top1" in first else ""]
        if tasks:
            scores = record["zero_shot"]
            row += [f"{scores['tasks'][task]['acc']:.2%}" for task in tasks] + [f"{scores['mean']:.2%}"]
        training = record.get("training", {})
        cut = [training[name]["ce"] for name in ("before_cut", "after_cut") if name in training]
        row.append(", ".join(f"{value:.4f}" for value in cut))
        row.append(str(timedelta(seconds=round(training["seconds"]))) if "seconds" in training else "")
        rows.append(row)
    return markdown_table(header, rows)


def _settings(records: Sequence[Record]) -> str:
    """The settings in which runs differ; the JSON file holds all."""
    configs = {f"{r['variant']}, {_budget(r)}": r["config"] for r in records if r["tokens"] is not None}
    names = sorted({name for config in configs.values() for name in config} - {"tokens", "steps"})
    differing = [name for name in names if len({json.dumps(config.get(name)) for config in configs.values()}) > 1]
    same = [f"{name} {next(iter(configs.values()))[name]}" for name in names if name not in differing]
    rows = [[label, *(str(config.get(name, "")) for name in differing)] for label, config in configs.items()]
    table = markdown_table(["run", *differing], rows)
    return f"## Settings\n\nThe same for all: {', '.join(same)}.\n\n{table}" if configs else ""


def _budget(record: Record) -> str:
    return "" if record["tokens"] is None else f"{record['tokens']:,}"
