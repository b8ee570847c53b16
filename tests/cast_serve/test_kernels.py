"""The kernel library itself: every instruction set of this machine against float64."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cast_serve import kernels
from cast_serve.kernels import prepack
from conversion.errors import InputError
from conversion.panel import to_panels
from tests.cast_serve.sparse_layers import random_layer

DTYPES = [torch.float32, torch.bfloat16]
BATCHES = [1, 3, 8, 17, 33]
COLUMNS = [8, 40, 576]
ROWS = [1, 33, 576]

PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def call(
    name: str,
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
    rows: int,
    run: Callable[..., None] | None = None,
) -> torch.Tensor:
    """Call a function of cast24.h that is named without its dtype; `run` NULL is the serial runner."""
    function = getattr(kernels.library(), name + ("_bf16" if weights[0].dtype == torch.bfloat16 else "_f32"))
    function.restype = None
    y = torch.full((x.shape[0], rows), torch.nan)
    sizes = [ctypes.c_int64(size) for size in (x.shape[0], rows, x.shape[1])]
    fusion = [ctypes.c_void_p(None)] if name == "cast24_linear" else []
    function(
        pointer(x),
        *map(pointer, weights),
        pointer(bias),
        *fusion,
        pointer(y),
        *sizes,
        run or ctypes.c_void_p(None),
        None,
    )
    return y


def assert_close(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Within a float32 sum's rounding of the float64 result: bf16 weights are exact operands."""
    expected = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    scale = x.double().abs() @ dense.double().abs().T + 1
    assert ((y.double() - expected).abs() / scale).max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_matches_float64(isa: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    layer = random_layer(rows, columns, dtype)
    panels = prepack(layer.values, layer.bitmask)
    for batch in BATCHES:
        x, bias = torch.randn(batch, columns), torch.randn(rows)
        seen = x.to(dtype) if isa == "avx512bf16" else x  # that one rounds inputs to bf16 for bf16 weights
        assert_close(call("cast24_linear", x, panels, bias, rows), seen, layer.dense, bias)
        assert_close(call("cast24_linear", x, panels, None, rows), seen, layer.dense, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows", "columns"), [(96, 33, 8), (128, 300, 2200), (230, 16, 4104), (1200, 40, 72)])
def test_many_rows_match_float64(isa: str, batch: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    layer, x, bias = random_layer(rows, columns, dtype), torch.randn(batch, columns), torch.randn(rows)
    seen = x.to(dtype) if isa == "avx512bf16" else x
    y = call("cast24_linear", x, prepack(layer.values, layer.bitmask), bias, rows)
    assert_close(y, seen, layer.dense, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [*COLUMNS, 77])
@pytest.mark.parametrize("rows", ROWS)
def test_dense_linear_matches_float64(isa: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, columns).to(dtype)
    for batch in BATCHES:
        x, bias = torch.randn(batch, columns), torch.randn(rows)
        assert_close(call("cast24_dense_linear", x, (weight,), bias, rows), x, weight, bias)
        assert_close(call("cast24_dense_linear", x, (weight,), None, rows), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(83, 40), (83, 1096), (300, 2200)])
def test_a_row_does_not_depend_on_its_batch(isa: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Continuous batching must not change greedy tokens: bit for bit the same row in every batch, at every place."""
    layer = random_layer(rows, columns, dtype)
    panels, x = prepack(layer.values, layer.bitmask), torch.randn(150, columns)
    for name, weights in (("cast24_linear", panels), ("cast24_dense_linear", (layer.dense,))):
        alone = torch.cat([call(name, row[None], weights, None, rows) for row in x])
        for batch in (*range(2, 20), 64, 65, 150):
            start = 150 - batch
            assert torch.equal(call(name, x[start:], weights, None, rows), alone[start:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows"), [(70, 83), (230, 300)])
def test_any_split_among_threads_gives_the_same(isa: str, batch: int, rows: int, dtype: torch.dtype) -> None:
    columns = 576
    layer = random_layer(rows, columns, dtype)
    panels, x = prepack(layer.values, layer.bitmask), torch.randn(batch, columns)
    seen = []

    @PARALLEL_FOR
    def one_unit_at_a_time(_pool: int, task: int, arg: int, units: int) -> None:
        seen.append(units)
        for unit in reversed(range(units)):
            TASK(task)(arg, unit, unit + 1)

    for name, weights in (("cast24_linear", panels), ("cast24_dense_linear", (layer.dense,))):
        split = call(name, x, weights, None, rows, one_unit_at_a_time)
        assert torch.equal(split, call(name, x, weights, None, rows))
    assert max(seen) > 1  # and one run for rounding the inputs or turning them, where the instruction set does that
    assert len(seen) in (2, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_prepack_agrees_with_the_exported_layout(rows: int, columns: int, dtype: torch.dtype) -> None:
    layer = random_layer(rows, columns, dtype)
    for packed, exported in zip(
        prepack(layer.values, layer.bitmask), to_panels(layer.values, layer.bitmask), strict=True
    ):
        assert torch.equal(packed, exported)


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - {3, 5, 6, 9, 10, 12}))
def test_prepack_names_a_group_that_does_not_keep_two(nibble: int) -> None:
    layer = random_layer(40, 64, torch.float32)
    layer.bitmask[33, 5] = nibble << 4 | 3
    with pytest.raises(InputError, match="row 33, group 11"):
        prepack(layer.values, layer.bitmask)


def test_prepack_refuses_wrong_shapes_and_dtypes() -> None:
    values, bitmask, _ = random_layer(4, 64, torch.float32)
    for bad_values, bad_bitmask, complaint in [
        (values.double(), bitmask, "float32 or bfloat16"),
        (values[:, :30], bitmask, "multiple of 8"),
        (values[0], bitmask, "multiple of 8"),
        (values, bitmask[:3], r"uint8 \[4, 8\]"),
        (values, bitmask.int(), r"uint8 \[4, 8\]"),
    ]:
        with pytest.raises(InputError, match=complaint):
            prepack(bad_values, bad_bitmask)


def test_an_unknown_instruction_set_is_refused() -> None:
    before = kernels.isa()
    with pytest.raises(InputError, match="'avx1024'"):
        kernels.set_isa("avx1024")
    assert kernels.isa() == before


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )


def test_the_environment_chooses_the_instruction_set() -> None:
    show = "from cast_serve import kernels; print(kernels.isa())"
    assert in_new_process(show, CAST24_ISA="portable").stdout.strip() == "portable"
    refused = in_new_process(show, CAST24_ISA="avx1024")
    assert refused.stdout.strip() == kernels.isa()
    assert "avx1024" in refused.stderr


def test_intels_cpus_get_their_own_order_of_things() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CAST24_ISA"}
    show = [sys.executable, "-c", "from cast_serve import kernels; print(kernels.isa())"]
    chosen = subprocess.run(show, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    about = Path("/proc/cpuinfo").read_text()
    has_vnni = all(f" {flag} " in f"{about} " for flag in ("avx512f", "avx512_vnni", "avx512vbmi"))
    assert (chosen == "avx512wide") == ("GenuineIntel" in about and has_vnni)


def test_the_library_is_found_without_importing_torch() -> None:
    code = "import sys; from cast_serve import kernels; kernels.isa(); print(any(m == 'torch' for m in sys.modules))"
    assert in_new_process(code).stdout.strip() == "False"
