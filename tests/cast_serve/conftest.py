"""Fixtures that more than one module of these tests uses."""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from cast_serve import kernels
from cast_serve.kernels.cuda import linear, torch_ops
from cast_serve.kernels.cuda.crossover import DEVICES, Table
from conversion.errors import InputError
from tests.cast_serve.cuda_emulation.runner import ALL_TYPES, Emulation, Launcher
from tests.cast_serve.tiny_llama import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The CUDA kernels on the CPU, of all types."""
    return Emulation(tmp_path_factory.mktemp("emulation"), ALL_TYPES)


@pytest.fixture
def emulated_gpu(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's operators take tensors on the CPU, and run in the emulation, as on an H100."""
    monkeypatch.setattr(linear, "launch_on_gpu", Launcher(emulation, None))
    monkeypatch.setattr(torch_ops, "table", lambda _: Table({}, DEVICES["H100"]))
    for name in ("linear_cuda", "linear_quantized_cuda", "linear_quantized", "quantized_rows"):
        monkeypatch.setattr(torch.ops.cast24, name, getattr(torch_ops, name), raising=False)


Interpreted = Callable[[str], ModuleType]
"""A module of Triton kernels, by its name."""


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreted]:
    """Imports modules whose kernels Triton interprets, on the CPU: it decides that when a kernel is defined."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """The interpreter holds bfloat16 as integers, and would multiply those."""
        wide = [self.cast_impl(each, tl.float32) if each.dtype.is_bf16() else each for each in (a, b)]
        return multiply(self, *wide, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Kernels share their work between two threads; other tests run in one."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=kernels.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the kernel library that this machine has, in use during the test."""
    best = kernels.isa()
    try:
        kernels.set_isa(request.param)
    except InputError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    kernels.set_isa(best)
