"""Drawing a DirectoryInfo for a terminal."""

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from conversion.inspection import DirectoryInfo


def print_info(info: DirectoryInfo, console: Console) -> None:
    """Print a table of the linears, where they are known, and the totals."""
    title = f"{info.directory}: {info.kind}, {info.model_type}, {info.value_dtype}"
    if info.layers:
        table = Table(title=title)
        table.add_column("linear", overflow="fold")
        for heading in ("shape", "zeros", "violations", "dense", "packed"):
            table.add_column(heading, justify="right")
        for layer in info.layers:
            table.add_row(
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{layer.sparsity:.1%}",
                f"[red]{layer.violations}[/red]" if layer.violations else "0",
                decimal(layer.dense_bytes),
                decimal(layer.packed_bytes),
            )
        console.print(table)
    totals = Table(
        show_header=False, title=None if info.layers else f"{info.directory}: {info.kind}, {info.model_type}"
    )
    totals.add_column()
    totals.add_column(justify="right")
    totals.add_row("weights as stored here", decimal(info.stored_bytes))
    if info.layers:
        totals.add_row("linears in scope", str(len(info.layers)))
        totals.add_row("zeros in them", f"{info.sparsity:.2%}")
        totals.add_row("groups that are not 2:4", str(info.violations))
        totals.add_row(f"linears dense, {info.value_dtype} too", decimal(info.linear_dense_bytes))
        totals.add_row("linears packed", decimal(info.linear_packed_bytes))
        totals.add_row("bits per weight of them", f"{info.packed_bits_per_weight:.2f}")
    else:
        totals.add_row("packed linears", decimal(info.linear_packed_bytes))
    totals.add_row("everything else", decimal(info.other_bytes))
    if info.embedding_dtype is not None:
        totals.add_row("embedding", info.embedding_dtype)
    if info.packed_ratio is not None:
        totals.add_row(f"whole model packed / dense, {info.value_dtype} too", f"{info.packed_ratio:.3f}")
    console.print(totals)
