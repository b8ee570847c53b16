"""Fixtures that more than one module of these tests uses."""

from collections.abc import Iterator

import pytest

from cast_serve import kernels
from cast_serve.kernels.cuda.small_m import VARIANTS
from conversion.errors import InputError
from tests.cast_serve.cuda_emulation.runner import ALL_TYPES, Emulation
from tests.cast_serve.tiny_llama import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The CUDA kernels on the CPU, of all types."""
    return Emulation(tmp_path_factory.mktemp("emulation"), VARIANTS, ALL_TYPES)


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
