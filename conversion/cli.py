"""`cast convert` and `cast info`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    packed = "packed"
    onnx = "onnx"
    tensorrt = "tensorrt"


class Quantize(StrEnum):
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


class EmbeddingDtype(StrEnum):
    int8 = "int8"
    int4 = "int4"


class ValueDtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert(
    source: Annotated[Path, typer.Argument(help="2:4 Hugging Face model, or a packed one (onnx), or its hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    to: Annotated[
        Target,
        typer.Option(
            help="packed: the portable checkpoint. onnx: what the CPU engine runs, also for dense models. tensorrt: "
            "for ONNX Runtime's TensorRT provider (pip install 'cast-serve\\[tensorrt]')."
        ),
    ] = Target.packed,
    value_dtype: Annotated[
        ValueDtype | None, typer.Option(help="Round kept values to this dtype. Default: as the source has them.")
    ] = None,
    quantize: Annotated[
        Quantize | None, typer.Option(help="Quantize kept values (packed only): 5, 3 or 5 bits a weight, and scales.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Dense columns that share a scale: 32, 64, 128 or 256. Default: 64 for int4, else one scale a row."
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text (.txt, .jsonl, .parquet) on which quantization minimises each layer's error; may be repeated. "
            "Default: round to nearest."
        ),
    ] = None,
    embedding: Annotated[
        EmbeddingDtype | None,
        typer.Option(help="Quantize embedding and lm_head too, rounding to nearest. Default: as the source has them."),
    ] = None,
    float_activations: Annotated[
        bool,
        typer.Option(
            "--float-activations",
            help="Leave activations in float32: what quantized values multiply, not rounded to 8 bits, and cached keys "
            "and values, not to bfloat16 (onnx only).",
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Then check the packed result against the source: bits and logits.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it was made so before.")] = False,
) -> None:
    """Convert a model: 2:4 weights into the packed checkpoint, or any supported model into an ONNX directory.

    Packs only what is exactly 2:4; the first tensor, row and group that is not is named. OUT appears whole or not.
    SOURCE may also be what compressed-tensors wrote: sparse-24-bitmask (16 bit, int8, fp8), marlin-24, dense 2:4.

    Example: cast convert my-2of4-model my-packed-model --verify

    With --quantize the kept values become integers or 8-bit floats: cast convert my-2of4-model my-int4-model --quantize
    int4 --embedding int8 --calibration train.jsonl
    """
    from conversion.errors import InputError
    from conversion.hub import local_model
    from conversion.quantization.formats import Quantization

    dtype = None if value_dtype is None else value_dtype.value
    dense_quantization = None if embedding is None else Quantization.named(embedding.value)
    if quantize is None and (group_size is not None or calibration):
        raise InputError("--group-size and --calibration are for quantized values: name a format with --quantize")
    if to is not Target.onnx and float_activations:
        raise InputError("--float-activations is for what the CPU engine runs: add --to onnx")
    if to is not Target.packed:
        if verify:
            raise InputError("--verify checks packed checkpoints: convert with --to packed --verify first")
        if quantize is not None:
            raise InputError(f"--quantize makes packed checkpoints: leave --to {to.value} out")
    if to is Target.tensorrt and embedding is not None:
        raise InputError("--embedding makes packed checkpoints: leave --to tensorrt out")
    source = local_model(source)
    if to is Target.tensorrt:
        from conversion.onnx.tensorrt import export_tensorrt

        export_tensorrt(source, out, dtype, overwrite=overwrite)
        print(f"made {out}: onnxruntime.InferenceSession takes its model.onnx, and the providers in providers.json")
        return
    if to is Target.onnx:
        from conversion.onnx import export

        export(
            source,
            out,
            dtype,
            float_activations=float_activations,
            embedding=dense_quantization,
            overwrite=overwrite,
            show_progress=True,
        )
    else:
        from conversion.pack import save_packed

        quantization = None if quantize is None else Quantization.named(quantize.value, group_size)
        save_packed(
            source,
            out,
            dtype,
            quantization=quantization,
            calibration=calibration or (),
            embedding=dense_quantization,
            overwrite=overwrite,
            show_progress=True,
        )
        if verify:
            from conversion.verification import verify as verify_packed

            print(verify_packed(out, source))
    print(f"made {out}; 'cast info {out}' shows what it holds")


def info(
    directory: Annotated[
        Path, typer.Argument(help="Hugging Face model, packed checkpoint or ONNX directory, or its hub id.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a model directory holds: sparsity and violations per linear, sizes dense and packed."""
    from rich.console import Console

    from conversion.hub import local_model
    from conversion.info_table import print_info
    from conversion.inspection import inspect_directory

    found = inspect_directory(local_model(directory), show_progress=not json)
    if json:
        print(found.as_json())
    else:
        print_info(found, Console())
