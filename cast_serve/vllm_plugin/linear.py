"""How vLLM loads and runs a packed linear: fused (qkv, gate and up) and cut for tensor parallelism like any other."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter

from cast_serve.kernels import isa
from cast_serve.torch_model.gpu_linear import QUANTIZED, SPARSE
from cast_serve.torch_model.modules import PackedLinear, SparseLinear
from cast_serve.torch_model.widening import has_kernel, widened
from cast_serve.vllm_plugin.parameters import check_loaded, counting
from conversion.errors import InputError
from conversion.packed import BITMASK_SUFFIX, SCALE_SUFFIX, VALUES_SUFFIX
from conversion.quantization.formats import Quantization, check_scale, check_values

if TYPE_CHECKING:
    from cast_serve.vllm_plugin.config import Cast24Config

VALUES, BITMASK, SCALE = (suffix.removeprefix(".") for suffix in (VALUES_SUFFIX, BITMASK_SUFFIX, SCALE_SUFFIX))


@register_weight_loader_v2_supported_method
class SparseLinearMethod(LinearMethodBase):
    """The portable tensors while they are loaded; after that a `PackedLinear` of the CPU kernels, and nothing else."""

    def __init__(self, config: "Cast24Config", name: str) -> None:
        self.config = config
        self.name = name

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        quantization = self.config.format.quantization
        self._check_shard(columns, input_size)
        self.rows, self.columns, self.dtype = rows, columns, params_dtype
        self.config.report.expect()
        load = extra_weight_attrs["weight_loader"]

        def register(name: str, columns: int, all_columns: int, dtype: torch.dtype) -> None:
            """A parameter [N, columns], `all_columns` wide in the checkpoint."""
            data = torch.empty(rows, columns, dtype=dtype)
            loader = counting(load, self.name, all_columns)
            parameter: BasevLLMParameter
            if name == SCALE and all_columns == 1:
                parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
            else:
                parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
            parameter.loaded_rows = 0
            layer.register_parameter(name, parameter)

        register(BITMASK, columns // 8, input_size // 8, torch.uint8)
        if quantization is None:
            register(VALUES, columns // 2, input_size // 2, params_dtype)
            return
        width, all_width = (quantization.stored_shape(rows, each // 2)[1] for each in (columns, input_size))
        register(VALUES, width, all_width, quantization.values.dtype)
        register(SCALE, quantization.groups(columns), quantization.groups(input_size), torch.float32)

    def _check_shard(self, columns: int, input_size: int) -> None:
        quantization = self.config.format.quantization
        unit = 8 if quantization is None or quantization.group_size is None else quantization.group_size
        if columns != input_size and columns % unit:
            raise InputError(
                f"layer '{self.name}' has {input_size} inputs, {columns} for each worker, which is no multiple of "
                f"{unit}, where its packed weight can be cut: choose another --tensor-parallel-size"
            )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        quantization = self.config.format.quantization
        names = [VALUES, BITMASK] if quantization is None else [VALUES, BITMASK, SCALE]
        check_loaded(layer, names, self.name, _checkpoint_rows(layer))
        tensors = {name: getattr(layer, name).data for name in names}
        for name in names:
            delattr(layer, name)
        try:
            packed = self._packed(quantization, **tensors)
        except InputError as error:
            raise InputError(f"layer '{self.name}': {error}") from None
        layer.packed = packed
        if isinstance(packed, SparseLinear):
            values = str(packed.panel_values.dtype)
        else:
            values = "fp8" if packed.panels.dtype == torch.float8_e4m3fn else f"int{packed.bits}"
        self.config.report.packed(
            self.name,
            f"the 2:4 {values.removeprefix('torch.')} kernel ({'CUDA' if tensors[VALUES].is_cuda else isa()})",
            sum(buffer.nbytes for buffer in packed.buffers()),
            self.rows * self.columns * self.dtype.itemsize,
        )

    def _packed(
        self,
        quantization: Quantization | None,
        weight_values: torch.Tensor,
        weight_bitmask: torch.Tensor,
        weight_scale: torch.Tensor | None = None,
    ) -> PackedLinear:
        device = weight_values.device.type
        if quantization is not None:
            assert weight_scale is not None
            check_values(weight_values, quantization.values)
            check_scale(weight_scale)
            if has_kernel(quantization, device):
                quantized = QUANTIZED[device](self.columns, self.rows, bias=False)
                group_size, floats = quantization.group_size, self.config.float_activations
                quantized.pack(weight_values, weight_bitmask, weight_scale, group_size, float_activations=floats)
                return quantized
            weight_values = widened(weight_values, weight_scale, quantization, self.columns, self.dtype)
        linear = SPARSE[device](self.columns, self.rows, bias=False)
        linear.pack(weight_values, weight_bitmask)
        return linear

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return multiply(layer.packed, x, bias)


def multiply(packed: PackedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] -> [..., N]. The kernels of CPUs take float32 and bfloat16, so float16 passes through float32."""
    if x.dtype == torch.float16 and not x.is_cuda:
        return packed.multiply(x.float(), bias).to(x.dtype)
    return packed.multiply(x, bias)


def _checkpoint_rows(layer: LinearBase) -> int:
    """Rows that the checkpoint holds for all shards of a layer together; vLLM counts replicated heads each time."""
    if (replicas := getattr(layer, "num_kv_head_replicas", 1)) > 1:
        query, key, value = layer.output_sizes
        return int(query + (key + value) // replicas)
    return int(layer.output_size)
