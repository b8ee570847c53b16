"""`cast tune`."""

from pathlib import Path
from typing import Annotated

import typer

from conversion.errors import InputError


def tune(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Packed model: a directory, or a hub id.")],
    max_rows: Annotated[int, typer.Option(min=1, help="Rows of x up to which is measured, by powers of two.")] = 8192,
    plot: Annotated[Path | None, typer.Option(help="Heat map to draw, .png or .svg (needs matplotlib).")] = None,
) -> None:
    """Measure on this GPU which 2:4 product is the fastest for every layer of DIR and number of rows.

    What is measured is kept for this device and these versions of driver, torch and cuSPARSELt; the operators choose
    by it from then on. Untuned layers go by a model of the device. int8 and fp8 weights with one scale a row then meet
    many rows of x rounded to 8 bits where that is the fastest.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError("cast tune measures a GPU, and this machine has no CUDA device that torch can use")
    from cast_serve.kernels.cuda.crossover import circumstances, save
    from cast_serve.kernels.cuda.heat_map import draw
    from cast_serve.kernels.cuda.measurement import Gpu
    from cast_serve.kernels.cuda.tune import ROWS, layers_of
    from cast_serve.kernels.cuda.tune import tune as measure
    from conversion.hub import local_model
    from conversion.progress import shown_progress

    layers = layers_of(local_model(directory))
    rows = [row for row in ROWS if row <= max_rows]
    with shown_progress("measuring", len(layers) * len(rows)) as advance:
        points = measure(Gpu(), layers, rows, advance)
    where = circumstances()
    print(f"wrote {save(points, where)}")
    if plot is not None:
        draw(points, plot, where["device"])
        print(f"wrote {plot}")
