// Inputs and attributes that every linear op on panels has beside its weight.
#pragma once

#include "custom_op.h"

namespace cast24 {

// The shape of a product, and what is done around it (cast24_fusion). Attributes N, K; epsilon with a norm; gated.
struct FusedLinear {
  int64_t N, K;
  bool gated;
  float epsilon;

  explicit FusedLinear(const Attributes& attributes)
      : N(attributes.integer("N")),
        K(attributes.integer("K")),
        gated(attributes.integer("gated", 0) != 0),
        epsilon(attributes.real("epsilon", 0.0f)) {
    require(N > 0 && K > 0 && K % 8 == 0, "attribute N must be positive and K a positive multiple of 8");
    require(!gated || N % 32 == 0, "attribute N of a gated op must be a multiple of 32");
  }

  // One call: what it reads beside x and the weight, all of it checked.
  struct Call {
    int64_t M;
    const float* bias;
    cast24_fusion fusion;
    float* y;
    int64_t bias_bytes;
  };

  // `first` is the index of bias; norm and residual follow it.
  Call prepare(Context& context, const Tensor& x, size_t first) const {
    const Tensor bias = context.input(first), norm = context.input(first + 1), residual = context.input(first + 2);
    require_columns(x, K);
    if (bias) require_shape("bias", bias, {N});
    if (norm) require_shape("norm", norm, {K});
    std::vector<int64_t> shape = x.shape;
    shape.back() = gated ? N / 2 : N;
    require(!residual || residual.shape == shape,
            "residual has shape ", residual.shape, ", expected ", shape);
    return {x.size() / K, bias.f32(), {norm.f32(), epsilon, gated, residual.f32()}, context.output(0, shape),
            bias ? 4 * bias.size() : 0};
  }
};

}  // namespace cast24
