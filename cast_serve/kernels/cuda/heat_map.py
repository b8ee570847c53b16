"""A picture of the crossover: for every layer and number of rows the fastest method, and its speed beside dense."""

from pathlib import Path

from cast_serve.kernels.cuda.crossover import DENSE, METHODS, Layer, Point

_LETTERS = dict(zip(METHODS, "stwecTW", strict=True))


def draw(points: dict[Layer, list[Point]], path: Path, title: str) -> None:
    """Write the picture to `path`, its format by the suffix. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted({point.rows for found in points.values() for point in found})
    speedups, letters = [], []
    for found in points.values():
        by_rows = {point.rows: point for point in found}
        cells = [_cell(by_rows.get(row)) for row in rows]
        speedups.append([speedup for speedup, _ in cells])
        letters.append([letter for _, letter in cells])
    figure = Figure(figsize=(2 + 0.75 * len(rows), 1.8 + 0.5 * len(points)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    image = axis.imshow(speedups, cmap="RdYlGn", vmin=0.5, vmax=2.0, aspect="auto")
    for y, line in enumerate(speedups):
        for x, speedup in enumerate(line):
            axis.text(x, y, f"{speedup:.2f} {letters[y][x]}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(rows)), [str(row) for row in rows])
    axis.set_yticks(range(len(points)), [f"{N} x {K} {dtype}" for N, K, dtype in points])
    axis.set_xlabel("rows of x;  " + ", ".join(f"{_LETTERS[method]}: {method}" for method in METHODS))
    axis.set_title(title)
    figure.colorbar(image, label="speed of the fastest method / dense")
    figure.savefig(path, dpi=120)


def _cell(point: Point | None) -> tuple[float, str]:
    """Speed beside dense and letter of the fastest method; NaN where nothing was measured."""
    known = [] if point is None else [method for method in METHODS if method in point.seconds]
    if point is None or not known or DENSE not in point.seconds:
        return float("nan"), ""
    best = min(known, key=lambda method: point.seconds[method])
    return point.seconds[DENSE] / point.seconds[best], _LETTERS[best]
