"""The stages of `cast pipeline`, in order: edit this list to change what it does."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Preset(StrEnum):
    quick = "quick"
    full = "full"


@dataclass(frozen=True)
class Stage:
    """One `cast` command.

    Attributes:
        name: what the terminal calls it.
        command: arguments that follow `cast`.
        inputs: files and directories it reads; if one changes, the stage runs again.
        outputs: files and directories that exist once it has succeeded.
        minutes: how long it takes for the demo's model on two cores, the start of the estimate of the time left; None
            where nobody knows.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    minutes: float | None


@dataclass(frozen=True)
class Outputs:
    """Where the stages write, below the pipeline's directory."""

    root: Path

    @property
    def permuted(self) -> Path:
        return self.root / "permuted"

    @property
    def cast(self) -> Path:
        return self.root / "cast"

    @property
    def curve(self) -> Path:
        return self.cast / "training.png"

    @property
    def packed(self) -> Path:
        return self.root / "cast-packed"

    def oneshot(self, method: str) -> Path:
        return self.root / f"one-shot-{method}"

    @property
    def quality(self) -> Path:
        return self.root / "quality.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def measurements(self) -> Path:
        return self.report / "bench.json"

    @property
    def page(self) -> Path:
        return self.report / "report.html"


def stages(
    source: Path, data: Path, heldout: Path, preset: Preset, out: Path, tokens: int | None = None
) -> list[Stage]:
    """Permute, train, evaluate next to one-shot baselines as they are usually made, convert, measure.

    Args:
        tokens: to train on; None for the preset's.
    """
    to = Outputs(out)
    budget = () if tokens is None else ("--tokens", f"{tokens}")
    baselines = {method: to.oneshot(method) for method in ("magnitude", "sparsegpt")}
    compared = [source, *baselines.values(), to.cast]
    return [
        Stage(
            "permute",
            ("permute", f"{source}", "--data", f"{data}", "--out", f"{to.permuted}"),
            inputs=(source, data),
            outputs=(to.permuted,),
            minutes=2,
        ),
        Stage(
            "train",
            (
                # --resume also begins a run; with it, one that was interrupted goes on
                *("train", f"{to.permuted}", "--resume"),
                *("--data", f"{data}", "--preset", preset.value, *budget, "--out", f"{to.cast}"),
            ),
            inputs=(to.permuted, data),
            outputs=(to.cast,),
            minutes=13 if preset is Preset.quick and tokens is None else None,
        ),
        *(
            Stage(
                f"one-shot {method}",
                ("train", f"{source}", "--method", method, "--data", f"{data}", "--out", f"{directory}"),
                inputs=(source, data),
                outputs=(directory,),
                minutes=2 if method == "sparsegpt" else 0.2,
            )
            for method, directory in baselines.items()
        ),
        Stage(
            "evaluate",
            ("eval", *map(str, compared), "--data", f"{heldout}", "--tokens", "20480", "--json", f"{to.quality}"),
            inputs=(*compared, heldout),
            outputs=(to.quality,),
            minutes=3,
        ),
        Stage(
            "convert",
            ("convert", f"{to.cast}", f"{to.packed}", "--to", "packed"),
            inputs=(to.cast,),
            outputs=(to.packed,),
            minutes=0.1,
        ),
        Stage(
            "measure",
            (
                *("bench", "--dense", f"{source}", "--sparse", f"{to.packed}", "--out", f"{to.report}"),
                *("--quality", f"{to.quality}", "--training-curve", f"{to.curve}"),
            ),
            inputs=(source, to.packed, to.quality),
            outputs=(to.measurements, to.page),
            minutes=3,
        ),
    ]
