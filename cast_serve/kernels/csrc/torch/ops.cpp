// torch.ops.cast24.*: a thin layer over cast24.h on torch's stable ABI (one build serves every torch >= 2.10).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cast24.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPanelRows = 16;

// `run` for the kernels: torch's own threads.
void on_torch_threads(void*, cast24_task task, void* arg, int64_t n) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { task(arg, begin, end); });
}

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "cast24::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

void require_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; same && d < shape.size(); ++d) same = t.size(d) == shape[d];
  if (same) return;
  std::string wanted;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  fail(op, name, " must have shape [", wanted, "], not ", shape_of(t));
}

void require_values(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float && t.scalar_type() != ScalarType::BFloat16)
    fail(op, name, " must be float32 or bfloat16");
}

// x as contiguous float32, of which the last axis is K.
Tensor activations(const char* op, const Tensor& x) {
  if (x.dim() < 1 || x.size(-1) % 8 != 0 || x.size(-1) == 0)
    fail(op, "the last axis of x must be a multiple of 8, x has shape ", shape_of(x));
  if (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::BFloat16)
    fail(op, "x must be float32 or bfloat16");
  const Tensor floats = x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float);
  return floats.is_contiguous() ? floats : torch::stable::contiguous(floats);
}

// bias as contiguous float32, if there is one.
std::optional<Tensor> bias_of(const char* op, const std::optional<Tensor>& bias, int64_t N) {
  if (!bias) return std::nullopt;
  require_shape(op, "bias", *bias, {N});
  const Tensor floats = bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float);
  return floats.is_contiguous() ? floats : torch::stable::contiguous(floats);
}

Tensor output_of(const Tensor& x, int64_t N) {
  std::vector<int64_t> shape(x.dim());
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape[d] = x.size(d);
  shape.back() = N;
  return torch::stable::new_empty(x, shape, ScalarType::Float);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

Tensor linear_packed(const Tensor& x, const Tensor& panel_values, const Tensor& panel_indices, int64_t out_features,
                     const std::optional<Tensor>& bias) {
  const char* op = "linear_packed";
  const Tensor input = activations(op, x);
  const int64_t K = x.size(-1), N = out_features, panels = (N + kPanelRows - 1) / kPanelRows;
  if (N < 1) fail(op, "out_features must be positive, not ", N);
  require_values(op, "panel_values", panel_values);
  const bool bf16 = panel_values.scalar_type() == ScalarType::BFloat16;
  if (bf16)
    require_shape(op, "panel_values", panel_values, {panels, K / 4, kPanelRows, 2});
  else
    require_shape(op, "panel_values", panel_values, {panels, K / 4, 2, kPanelRows});
  require_shape(op, "panel_indices", panel_indices, {panels, (K / 4 + 7) / 8, kPanelRows});
  if (panel_indices.scalar_type() != ScalarType::UInt32) fail(op, "panel_indices must be uint32");
  if (!panel_values.is_contiguous() || !panel_indices.is_contiguous())
    fail(op, "panel_values and panel_indices must be contiguous");
  const std::optional<Tensor> bias_f32 = bias_of(op, bias, N);

  const Tensor y = output_of(input, N);
  const int64_t M = input.numel() / K;
  const uint32_t* indices = data<uint32_t>(panel_indices);
  const float* b = bias_f32 ? data<float>(*bias_f32) : nullptr;
  float* out = static_cast<float*>(y.mutable_data_ptr());
  if (bf16)
    cast24_linear_bf16(data<float>(input), data<uint16_t>(panel_values), indices, b, nullptr, out, M, N, K,
                       on_torch_threads, nullptr);
  else
    cast24_linear_f32(data<float>(input), data<float>(panel_values), indices, b, nullptr, out, M, N, K, on_torch_threads,
                      nullptr);
  return x.scalar_type() == ScalarType::Float ? y : torch::stable::to(y, x.scalar_type());
}

int64_t panel_group(int64_t K, int64_t scales) {
  if (scales == 1) return 128;  // one scale for a row: any group will do
  for (int64_t group : {32, 64, 128, 256})
    if ((K + group - 1) / group == scales) return group;
  return 0;
}

Tensor quantized_product(const char* op, const Tensor& x, const uint8_t* panels, int64_t N, int bits, bool sparse,
                         int64_t group, bool float_activations, const std::optional<Tensor>& bias) {
  const Tensor input = activations(op, x);
  const std::optional<Tensor> bias_f32 = bias_of(op, bias, N);
  const Tensor y = output_of(input, N);
  const int64_t K = x.size(-1);
  cast24_linear_quantized(data<float>(input), panels, bias_f32 ? data<float>(*bias_f32) : nullptr, nullptr,
                          static_cast<float*>(y.mutable_data_ptr()), input.numel() / K, N, K, bits, sparse, group,
                          float_activations, on_torch_threads, nullptr);
  return x.scalar_type() == ScalarType::Float ? y : torch::stable::to(y, x.scalar_type());
}

Tensor linear_quantized(const Tensor& x, const Tensor& panels, int64_t out_features, int64_t bits, bool sparse,
                        int64_t group_size, bool float_activations, const std::optional<Tensor>& bias) {
  const char* op = "linear_quantized";
  if (x.dim() < 1) fail(op, "x must have at least one axis");
  if (bits != 8 && bits != 4) fail(op, "bits must be 8 or 4, not ", bits);
  if (group_size != 32 && group_size != 64 && group_size != 128 && group_size != 256)
    fail(op, "group_size must be 32, 64, 128 or 256, not ", group_size);
  if (out_features < 1) fail(op, "out_features must be positive, not ", out_features);
  if (panels.scalar_type() != ScalarType::Byte || !panels.is_contiguous()) fail(op, "panels must be contiguous uint8");
  require_shape(op, "panels", panels,
                {(out_features + kPanelRows - 1) / kPanelRows,
                 cast24_quantized_panel_bytes(static_cast<int>(bits), sparse, x.size(-1), group_size)});
  return quantized_product(op, x, data<uint8_t>(panels), out_features, static_cast<int>(bits), sparse, group_size,
                           float_activations, bias);
}

// The portable tensors of quantized values, packed anew.
Tensor linear_portable_quantized(const Tensor& x, const Tensor& values, const Tensor& bitmask, const Tensor& scale,
                                 const std::optional<Tensor>& bias) {
  const char* op = "linear";
  const int64_t K = activations(op, x).size(-1), N = values.dim() == 2 ? values.size(0) : 0;
  const bool wide = values.scalar_type() == ScalarType::Char;
  if (!wide && values.scalar_type() != ScalarType::Byte) fail(op, "values with a scale must be int8, or uint8 of two int4");
  require_shape(op, "values", values, {N, wide ? K / 2 : K / 4});
  require_shape(op, "bitmask", bitmask, {N, K / 8});
  if (bitmask.scalar_type() != ScalarType::Byte) fail(op, "bitmask must be uint8");
  const int64_t group = scale.dim() == 2 && scale.size(0) == N ? panel_group(K, scale.size(1)) : 0;
  if (group == 0 || scale.scalar_type() != ScalarType::Float)
    fail(op, "scale must be float32 [N, 1], or [N, ceil(K / G)] with G 32, 64, 128 or 256, not ", shape_of(scale));
  const Tensor kept = torch::stable::contiguous(values), mask = torch::stable::contiguous(bitmask);
  const Tensor scales = torch::stable::contiguous(scale);
  const int bits = wide ? 8 : 4;
  const int64_t size = (N + kPanelRows - 1) / kPanelRows * cast24_quantized_panel_bytes(bits, 1, K, group);
  const std::unique_ptr<uint8_t[]> panels(new uint8_t[size]);
  const int64_t bad = cast24_prepack_quantized(static_cast<const uint8_t*>(kept.const_data_ptr()), data<uint8_t>(mask),
                                               data<float>(scales), scale.size(1) == 1 ? K : group, N, K, bits, group,
                                               panels.get());
  if (bad >= 0) fail(op, "the bitmask does not keep exactly two in row ", bad / (K / 4), ", group ", bad % (K / 4));
  return quantized_product(op, x, panels.get(), N, bits, true, group, false, bias);
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& bitmask, const std::optional<Tensor>& scale,
              const std::optional<Tensor>& bias) {
  const char* op = "linear";
  if (scale) return linear_portable_quantized(x, values, bitmask, *scale, bias);
  const Tensor input = activations(op, x);
  const int64_t K = x.size(-1), N = values.dim() == 2 ? values.size(0) : 0;
  require_values(op, "values", values);
  require_shape(op, "values", values, {N, K / 2});
  require_shape(op, "bitmask", bitmask, {N, K / 8});
  if (bitmask.scalar_type() != ScalarType::Byte) fail(op, "bitmask must be uint8");
  const std::optional<Tensor> bias_f32 = bias_of(op, bias, N);
  const Tensor kept = torch::stable::contiguous(values), mask = torch::stable::contiguous(bitmask);

  const Tensor y = output_of(input, N);
  const int64_t M = input.numel() / K;
  const uint8_t* bits = data<uint8_t>(mask);
  const float* b = bias_f32 ? data<float>(*bias_f32) : nullptr;
  float* out = static_cast<float*>(y.mutable_data_ptr());
  const int64_t bad = values.scalar_type() == ScalarType::BFloat16
                          ? cast24_linear_bitmask_bf16(data<float>(input), data<uint16_t>(kept), bits, b, out, M, N, K,
                                                       on_torch_threads, nullptr)
                          : cast24_linear_bitmask_f32(data<float>(input), data<float>(kept), bits, b, out, M, N, K,
                                                      on_torch_threads, nullptr);
  if (bad >= 0) fail(op, "the bitmask does not keep exactly two in row ", bad / (K / 4), ", group ", bad % (K / 4));
  return x.scalar_type() == ScalarType::Float ? y : torch::stable::to(y, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY(cast24, m) {
  m.def("linear(Tensor x, Tensor values, Tensor bitmask, Tensor? scale=None, Tensor? bias=None) -> Tensor");
  m.def(
      "linear_packed(Tensor x, Tensor panel_values, Tensor panel_indices, int out_features, Tensor? bias=None) -> "
      "Tensor");
  m.def(
      "linear_quantized(Tensor x, Tensor panels, int out_features, int bits, bool sparse, int group_size, "
      "bool float_activations=False, Tensor? bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cast24, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
  m.impl("linear_quantized", TORCH_BOX(&linear_quantized));
}
