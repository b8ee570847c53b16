"""What the driver is asked to encode, with a function in its place."""

import ctypes
from typing import Any

import pytest

from cast_serve.kernels.cuda import tensor_map
from cast_serve.kernels.cuda.arguments import LinearArguments, WarpgroupArguments
from cast_serve.kernels.cuda.tensor_map import TensorMap, encoded


class Driver:
    """Attributes: asked: arguments of every call, arrays as tuples."""

    def __init__(self, error: int = 0) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._error = error

    def cuTensorMapEncodeTiled(self, place: ctypes.c_void_p, *given: Any) -> int:
        assert place.value is not None
        assert place.value % 64 == 0
        ctypes.memset(place, 7, 128)
        self.asked.append(tuple(tuple(each) if isinstance(each, ctypes.Array) else each.value for each in given))
        return self._error


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(tensor_map, "_driver", lambda: found)
    tensor_map._encode.cache_clear()
    return found


def test_rows_of_boxes_are_swizzled_and_zeros_are_outside(driver: Driver) -> None:
    for _ in range(2):
        assert bytes(encoded(TensorMap(4096, 2, 72, 130, 192, 64, 32))) == bytes([7]) * 128
    # 16-bit integers, 2 axes: columns and rows, bytes from row to row, the box; not interleaved, swizzled by 128 bytes
    (asked,) = driver.asked
    assert asked == (1, 2, 4096, (72, 130), (192,), (64, 32), (1, 1), 0, 3, 3, 0)
    encoded(TensorMap(4096, 1, 128, 130, 192, 128, 32))
    assert driver.asked[1] == (0, 2, 4096, (128, 130), (192,), (128, 32), (1, 1), 0, 3, 3, 0)  # bytes


def test_what_the_driver_refuses_is_an_error(driver: Driver) -> None:
    driver._error = 1
    with pytest.raises(RuntimeError, match="answered 1 to a tensor map of 130 x 72, 190 apart"):
        encoded(TensorMap(4096, 2, 72, 130, 190, 64, 32))


def test_the_kernels_argument_is_as_large_as_the_compiler_makes_it() -> None:
    assert ctypes.sizeof(TensorMap) == 128
    assert ctypes.sizeof(WarpgroupArguments) == -(-(128 + ctypes.sizeof(LinearArguments)) // 64) * 64
