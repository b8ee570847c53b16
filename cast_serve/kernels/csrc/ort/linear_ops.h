// Linear layers as ONNX ops.
#pragma once

#include "fused_linear.h"

namespace cast24 {

// y[..., N] = x[..., K] W^T + bias, and what fused_linear.h puts around it, with W 2:4 in panel layout (cast24.h): values
// f32 [P, G, 2, 16] or bf16 [P, G, 16, 2], indices u32 [P, ceil(G / 8), 16].
struct Sparse24MatMul : CpuOp {
  static constexpr const char* name = "Sparse24MatMul";
  static constexpr Input inputs[] = {{kFloat, kRequired}, {kAnyType, kRequired}, {kUint32, kRequired},
                                     {kFloat, kOptional}, {kFloat, kOptional},   {kFloat, kOptional}};

  FusedLinear linear;
  ResidentWeights resident_values, resident_indices;

  explicit Sparse24MatMul(const Attributes& attributes)
      : linear(attributes), resident_values(attributes.resident(1)), resident_indices(attributes.resident(2)) {}

  // Returns the bytes of the weights.
  int64_t run(Context& context) const {
    const Tensor x = context.input(0), values = context.input(1), indices = context.input(2);
    const int64_t N = linear.N, K = linear.K, panels = (N + 15) / 16, groups = K / 4;
    const bool bf16 = bf16_or_float("values", values);
    if (bf16) {
      require_shape("values", values, {panels, groups, 16, 2});
    } else {
      require_shape("values", values, {panels, groups, 2, 16});
    }
    require_shape("indices", indices, {panels, (groups + 7) / 8, 16});
    const FusedLinear::Call call = linear.prepare(context, x, 3);

    const void* kept = resident_values.or_else(values.data);
    const uint32_t* columns = static_cast<const uint32_t*>(resident_indices.or_else(indices.data));
    if (call.M > 0 && bf16) {
      cast24_linear_bf16(x.f32(), static_cast<const uint16_t*>(kept), columns, call.bias, &call.fusion, call.y, call.M, N, K,
                         Context::parallel_for, &context);
    } else if (call.M > 0) {
      cast24_linear_f32(x.f32(), static_cast<const float*>(kept), columns, call.bias, &call.fusion, call.y, call.M, N, K,
                        Context::parallel_for, &context);
    }
    return values.size() * (bf16 ? 2 : 4) + indices.size() * 4 + call.bias_bytes;
  }
};

// y[..., N] = x[..., K] W^T + bias with a dense row-major weight [N, K], f32 or bf16: the layout of an embedding, so that
// a tied one is held once for both Gather and the logits.
struct DenseLinear : CpuOp {
  static constexpr const char* name = "DenseLinear";
  static constexpr Input inputs[] = {{kFloat, kRequired}, {kAnyType, kRequired}, {kFloat, kOptional}};

  explicit DenseLinear(const Attributes&) {}

  int64_t run(Context& context) const {
    const Tensor x = context.input(0), weight = context.input(1), bias = context.input(2);
    require(weight.shape.size() == 2, "weight has shape ", weight.shape, ", expected [N, K]");
    const int64_t N = weight.shape[0], K = weight.shape[1];
    require_columns(x, K);
    const bool bf16 = bf16_or_float("weight", weight);
    if (bias) require_shape("bias", bias, {N});

    std::vector<int64_t> shape = x.shape;
    shape.back() = N;
    float* y = context.output(0, shape);
    const int64_t M = K > 0 ? x.size() / K : 0;
    if (M > 0 && bf16) {
      cast24_dense_linear_bf16(x.f32(), static_cast<const uint16_t*>(weight.data), bias.f32(), y, M, N, K,
                               Context::parallel_for, &context);
    } else if (M > 0) {
      cast24_dense_linear_f32(x.f32(), weight.f32(), bias.f32(), y, M, N, K, Context::parallel_for, &context);
    }
    return weight.size() * (bf16 ? 2 : 4) + bias.size() * (bias ? 4 : 0);
  }
};

}  // namespace cast24
