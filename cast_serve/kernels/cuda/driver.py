"""Loads and launches kernels through the CUDA driver, on torch's current device and stream."""

import ctypes
from functools import cache
from typing import Any

import torch

from cast_serve.kernels.cuda.arguments import WarpgroupArguments
from cast_serve.kernels.cuda.nvrtc import cached_code, target
from cast_serve.kernels.cuda.plan import Entry
from cast_serve.kernels.cuda.tensor_map import encoded


@cache
def kernels(source: str, device: int) -> "Kernels":
    """The kernels of a source on a device, compiled and loaded once in a process."""
    return Kernels(source, device)


class Kernels:
    """The extern "C" kernels of one source, by name. Loading them is no work for a stream that is being captured."""

    def __init__(self, source: str, device: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        code = cached_code(source, target(torch.cuda.get_device_capability(device)))
        with torch.cuda.device(device):
            torch.cuda.current_stream().cuda_stream  # noqa: B018  torch makes the device's context
            self._module = _check(driver.cuModuleLoadData(code))
        self._functions: dict[str, Any] = {}

    def launch(
        self, entry: Entry, grid: tuple[int, int, int], arguments: ctypes.Structure, overlap: bool = False
    ) -> None:
        """Launch on the current stream of the current device a kernel whose one parameter is `arguments`.

        Args:
            overlap: let it begin before the stream's previous kernel has ended (sm_90 and newer): it waits by itself,
                with griddepcontrol.wait.
        """
        function = self._functions.get(entry.name) or self._function(entry)
        if isinstance(arguments, WarpgroupArguments):
            arguments = WarpgroupArguments(encoded(arguments.x), arguments.linear)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = torch.cuda.current_stream().cuda_stream
        if overlap:
            config = self._overlapping(entry, grid, stream)
            _check(self._driver.cuLaunchKernelEx(config, function, ctypes.addressof(parameters), 0))
        else:
            where = (*grid, entry.threads, 1, 1, entry.shared_bytes, stream)
            _check(self._driver.cuLaunchKernel(function, *where, ctypes.addressof(parameters), 0))

    def _function(self, entry: Entry) -> Any:
        function = _check(self._driver.cuModuleGetFunction(self._module, entry.name.encode()))
        if entry.shared_bytes:
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(self._driver.cuFuncSetAttribute(function, attribute, entry.shared_bytes))
        self._functions[entry.name] = function
        return function

    def _overlapping(self, entry: Entry, grid: tuple[int, int, int], stream: int) -> Any:
        driver = self._driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = entry.threads, 1, 1
        config.sharedMemBytes = entry.shared_bytes
        config.hStream = driver.CUstream(stream)
        config.attrs, config.numAttrs = [attribute], 1
        return config


def _check(result: tuple[Any, ...]) -> Any:
    """What the driver returned, without its error code; RuntimeError if that is one."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"the CUDA driver answered {error.name}")
    return values[0] if values else None
