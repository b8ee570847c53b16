"""`python -m benchmarks.quality table|sweep`: every 2:4 method trained and evaluated at equal tokens; tuning on record.

Both write dated markdown or JSON and a plot to benchmarks/results. Cells that are finished are reused, one that was
interrupted goes on; runs lie in --work. They train and evaluate by the same functions as `cast train` and `cast eval`.
"""

import itertools
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cast_train.config import setting_value
from conversion.command import run
from conversion.errors import InputError

if TYPE_CHECKING:
    from benchmarks.comparison.study import Study

RESULTS = Path(__file__).parent / "results"

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Model = Annotated[Path, typer.Argument(help="Dense model directory.")]
Data = Annotated[list[str], typer.Option(help="Training text, as for `cast train`; may be repeated.")]
Heldout = Annotated[
    list[Path], typer.Option(help="Text to score; may be repeated. KL and zero-shot are shown beside the first.")
]
Work = Annotated[Path, typer.Option(help="Directory of runs and finished cells, to reuse and go on with.")]
Name = Annotated[str, typer.Option(help="What results are called, after the date: the machine, say.")]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="KEY=VALUE for all trained methods, METHOD.KEY=VALUE for one; keys of CastConfig. May be repeated.",
    ),
]
PresetName = Annotated[str, typer.Option(help="Settings to start from: quick or full.")]
Context = Annotated[int | None, typer.Option(help="Tokens per held-out window, as for `cast eval`.", min=2)]
EvalTokens = Annotated[int, typer.Option(help="Most held-out tokens to score.", min=2)]
TaskDir = Annotated[Path | None, typer.Option(help="Zero-shot tasks, as for `cast eval`; none without it.")]
Tasks = Annotated[str | None, typer.Option(help="Zero-shot tasks by name, with commas; from the hub, or --task-dir.")]
Limit = Annotated[int | None, typer.Option(help="Most items of each zero-shot task.", min=1)]
Keep = Annotated[bool, typer.Option("--keep-models", help="Leave trained models in --work.")]
Out = Annotated[Path, typer.Option(help="Directory of the results.")]
DEFAULT_METHODS = "dense,magnitude,wanda,sparsegpt,admm,gmp,srste,ast,cast"


@app.command()
def table(
    model: Model,
    data: Data,
    heldout: Heldout,
    tokens: Annotated[str, typer.Option(help="Training tokens of each method: budgets, with commas.")],
    methods: Annotated[str, typer.Option(help="What to compare, with commas.")] = DEFAULT_METHODS,
    ablations: Annotated[bool, typer.Option("--ablations", help="Also CAST without each of its parts.")] = False,
    preset: PresetName = "quick",
    set_: Settings = [],  # noqa: B006
    context: Context = None,
    eval_tokens: EvalTokens = 50_176,
    task_dir: TaskDir = None,
    tasks: Tasks = None,
    limit: Limit = None,
    work: Work = Path("quality"),
    name: Name = "quality",
    out: Out = RESULTS,
    keep_models: Keep = False,
) -> None:
    """Train and evaluate methods at equal tokens: a table, and perplexity over training tokens.

    Example, minutes a method on a CPU:

        python -m benchmarks.quality table SmolLM2-135M-Instruct --data mix/train --heldout mix/heldout.jsonl
        --tokens 51200
    """
    from rich.console import Console

    from benchmarks.comparison.plots import plot_budgets
    from benchmarks.comparison.progress import run_cells
    from benchmarks.comparison.report import write_json, write_markdown
    from benchmarks.comparison.study import plan
    from benchmarks.comparison.variants import ABLATIONS, find_variants

    study = _study(
        model, data, heldout, preset, set_, context, eval_tokens, (tasks, task_dir, limit), work, keep_models
    )
    variants = find_variants(methods) + (ABLATIONS if ablations else [])
    cells = plan(study, variants, parse_budgets("--tokens", tokens))
    about = _about(study)
    paths = _targets(out, name)

    def write(records: list[dict[str, Any]], plot: str | None = None) -> None:
        about["device"] = _device(records, about["device"])
        write_json(records, about, paths["json"])
        write_markdown(records, about, paths["md"], plot)

    console = Console(highlight=False, soft_wrap=True)
    records = run_cells(study, cells, write, console)
    if any("failed" not in record for record in records):
        plot_budgets(records, paths["png"], f"2:4 methods at equal tokens: {about['model']}")
        write(records, paths["png"].name)
    console.print(paths["md"].read_text(), markup=False)
    console.print(f"written: {paths['md']}, .json, .png")


@app.command()
def sweep(
    model: Model,
    data: Data,
    heldout: Heldout,
    tokens: Annotated[int, typer.Option(help="Training tokens of each point.", min=1)],
    over: Annotated[
        list[str], typer.Option(help="KEY=VALUE,VALUE,...: a setting to try; all combinations if repeated.")
    ],
    method: Annotated[str, typer.Option(help="Which method to tune.")] = "cast",
    preset: PresetName = "quick",
    set_: Settings = [],  # noqa: B006
    context: Context = None,
    eval_tokens: EvalTokens = 50_176,
    task_dir: TaskDir = None,
    tasks: Tasks = None,
    limit: Limit = None,
    work: Work = Path("quality"),
    name: Name = "sweep",
    out: Out = RESULTS,
    keep_models: Keep = False,
) -> None:
    """Train one method with every combination of some settings, and write down all points.

    Example: python -m benchmarks.quality sweep SmolLM2-135M-Instruct --data mix/train --heldout mix/heldout.jsonl
    --tokens 25600 --over lr=5e-5,1e-4,2e-4 --over eta=0.5,0.9
    """
    from rich.console import Console
    from rich.table import Table

    from benchmarks.comparison.plots import plot_sweep
    from benchmarks.comparison.progress import run_cells
    from benchmarks.comparison.report import perplexity, write_json
    from benchmarks.comparison.variants import find_variants

    study = _study(
        model, data, heldout, preset, set_, context, eval_tokens, (tasks, task_dir, limit), work, keep_models
    )
    variants = find_variants(method)
    if len(variants) != 1 or not variants[0].trained:
        raise InputError(f"--method '{method}': give one that is trained, for example cast")
    swept = dict(_swept(entry) for entry in over)
    points = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    cells = [study.cell(variants[0], tokens, **point) for point in points]
    about = _about(study) | {"method": method, "tokens": tokens, "swept": swept}
    paths = _targets(out, name)

    def write(records: list[dict[str, Any]]) -> None:
        about["device"] = _device(records, about["device"])
        write_json(records, about, paths["json"])

    console = Console(highlight=False, soft_wrap=True)
    records = run_cells(study, cells, write, console)
    if any("failed" not in record for record in records):
        plot_sweep(records, swept, paths["png"], f"{method}, {tokens:,} tokens: {about['model']}")
    text = heldout[0].name
    shown = Table(*swept, f"perplexity on {text}")
    for record in sorted(records, key=lambda r: float("inf") if "failed" in r else perplexity(r, text)):
        value = "failed" if "failed" in record else f"{perplexity(record, text):.2f}"
        shown.add_row(*(str(record["config"][key]) for key in swept), value)
    console.print(shown)
    console.print(f"written: {paths['json']}, .png")


def _study(
    model: Path,
    data: list[str],
    heldout: list[Path],
    preset: str,
    settings: list[str],
    context: int | None,
    eval_tokens: int,
    zero_shot: tuple[str | None, Path | None, int | None],
    work: Path,
    keep_models: bool,
) -> "Study":
    from benchmarks.comparison.study import Study
    from cast_train.config import PRESETS
    from cast_train.evaluation.zero_shot import Tasks as ZeroShotTasks

    if preset not in PRESETS:
        raise InputError(f"there is no preset '{preset}': use one of {', '.join(PRESETS)}")
    tasks, task_dir, limit = zero_shot
    for path in [model, *heldout, *([task_dir] if task_dir else [])]:
        if not path.exists():
            raise InputError(f"{path} does not exist")
    names = tuple(filter(None, (part.strip() for part in (tasks or "").split(","))))
    changes, own_changes = parse_settings(settings)
    return Study(
        model=model,
        data=tuple(data),
        heldout=tuple(heldout),
        work=work,
        context=context,
        eval_tokens=eval_tokens,
        tasks=ZeroShotTasks(names, task_dir, limit) if names or task_dir else None,
        preset=preset,
        changes=changes,
        own_changes=own_changes,
        keep_models=keep_models,
    )


def parse_settings(entries: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Parse --set: settings for all, and settings by method."""
    from benchmarks.comparison.variants import VARIANTS

    common: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        method, dot, key = name.rpartition(".")
        if not equals or not key or key in ("tokens", "steps") or (dot and method not in VARIANTS):
            raise InputError(f"--set {entry}: give KEY=VALUE or METHOD.KEY=VALUE, for example lr=1e-4 or ast.lr=2e-4")
        (own.setdefault(method, {}) if dot else common)[key] = setting_value(value)
    return common, own


def _swept(entry: str) -> tuple[str, list[Any]]:
    key, equals, values = entry.partition("=")
    if not equals or not key or not values or key in ("tokens", "steps"):
        raise InputError(f"--over {entry}: give KEY=VALUE,VALUE, for example lr=1e-4,2e-4; the budget is --tokens")
    together = setting_value(f"[{values}]")  # a value may be a list itself, with commas of its own
    return key, together if isinstance(together, list) else [setting_value(value) for value in values.split(",")]


def parse_budgets(option: str, text: str) -> list[int]:
    try:
        numbers = sorted({int(part.replace("_", "")) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise InputError(f"{option} '{text}' is no list of positive numbers: give for example 51200,102400")
    return numbers


def _about(study: "Study") -> dict[str, Any]:
    from benchmarks.load.machine import this_machine
    from cast_train.evaluation.evaluate import versions

    machine = this_machine()
    zero_shot = None
    if study.tasks is not None:
        zero_shot = {"limit": study.tasks.limit, "tasks": list(study.tasks.names), "few_shot": 0}
    return {
        "date": date.today().isoformat(),
        "device": f"{machine.cpu}, {machine.cores} cores",
        "versions": versions(),
        "model": study.model.resolve().name,
        "data": list(study.data),
        "heldout": [str(text) for text in study.heldout],
        "zero_shot": zero_shot,
        "preset": study.preset,
    }


def _device(records: list[dict[str, Any]], machine: str) -> str:
    """The accelerator that the cells ran on, or else the machine's processor."""
    found = {record["device"] for record in records if record.get("device", "cpu") != "cpu"}
    return ", ".join(sorted(found)) or machine


def _targets(out: Path, name: str) -> dict[str, Path]:
    """Files of one study by their ending."""
    out.mkdir(parents=True, exist_ok=True)
    return {ending: out / f"{date.today().isoformat()}-{name}.{ending}" for ending in ("json", "md", "png")}


if __name__ == "__main__":
    run(app)
