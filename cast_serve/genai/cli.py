"""`cast export-genai`."""

from pathlib import Path
from typing import Annotated

import typer


def export_genai(
    source: Annotated[Path, typer.Argument(help="2:4 model, packed or not: a directory, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it was made so before.")] = False,
) -> None:
    """Export a 2:4 model for onnxruntime-genai on NVIDIA GPUs, its linears by our kernels.

    Example: cast export-genai my-packed-model my-genai-model, and on a machine with a GPU pip install
    onnxruntime-genai-cuda, whose onnxruntime_genai.Model takes that directory.
    """
    from cast_serve.genai.export import export_genai
    from conversion.hub import local_model

    operators = export_genai(local_model(source), out, overwrite=overwrite, show_progress=True)
    print(f"made {out}: {operators} linears of 2:4 weights, float16, for CUDA GPUs of compute capability 8.0 or newer")
