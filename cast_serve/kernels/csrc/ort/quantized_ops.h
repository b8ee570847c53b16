// Linear layers and an embedding with quantized weights as ONNX ops. Weights are panels (cast24.h).
#pragma once

#include "fused_linear.h"

namespace cast24 {

struct QuantizedAttributes {
  int64_t N, K, bits, group;

  explicit QuantizedAttributes(const Attributes& attributes)
      : N(attributes.integer("N")),
        K(attributes.integer("K")),
        bits(attributes.integer("bits")),
        group(attributes.integer("group_size")) {
    require(N > 0 && K > 0 && K % 8 == 0, "attribute N must be positive and K a positive multiple of 8");
    require(bits == 8 || bits == 4, "attribute bits must be 8 or 4");
    require(group == 32 || group == 64 || group == 128 || group == 256, "attribute group_size must be 32, 64, 128 or 256");
  }

  void require_panels(const Tensor& panels, bool sparse) const {
    require_type("panels", panels, kUint8);
    require_shape("panels", panels,
                  {(N + 15) / 16, cast24_quantized_panel_bytes(static_cast<int>(bits), sparse, K, group)});
  }
};

// y[..., N] = x[..., K] W^T + bias with a quantized W, and what fused_linear.h puts around it. With attribute
// float_activations 1, x is not rounded to 8 bits; with resident 1, a dense weight, too, is copied onto huge pages (it may be an
// embedding as well, which reads it in place).
template <bool Sparse>
struct MatMulNBits : CpuOp {
  static constexpr const char* name = Sparse ? "Sparse24MatMulNBits" : "DenseNBits";
  static constexpr Input inputs[] = {
      {kFloat, kRequired}, {kUint8, kRequired}, {kFloat, kOptional}, {kFloat, kOptional}, {kFloat, kOptional}};

  QuantizedAttributes weight;
  FusedLinear linear;
  bool float_activations;
  ResidentWeights resident;

  explicit MatMulNBits(const Attributes& attributes)
      : weight(attributes), linear(attributes), float_activations(attributes.integer("float_activations", 0) != 0) {
    if (Sparse || attributes.integer("resident", 0) != 0) resident = attributes.resident(1);
  }

  // Returns the bytes of the weights.
  int64_t run(Context& context) const {
    const Tensor x = context.input(0), panels = context.input(1);
    weight.require_panels(panels, Sparse);
    const FusedLinear::Call call = linear.prepare(context, x, 2);
    if (call.M > 0)
      cast24_linear_quantized(x.f32(), static_cast<const uint8_t*>(resident.or_else(panels.data)), call.bias, &call.fusion,
                              call.y, call.M, weight.N, weight.K, static_cast<int>(weight.bits), Sparse, weight.group,
                              float_activations, Context::parallel_for, &context);
    return panels.size() + call.bias_bytes;
  }
};

using Sparse24MatMulNBits = MatMulNBits<true>;
using DenseNBits = MatMulNBits<false>;

// y[..., K] = the rows `ids` of a dense quantized weight: a tied embedding is held once for lookup and logits.
struct EmbeddingNBits : CpuOp {
  static constexpr const char* name = "EmbeddingNBits";
  static constexpr Input inputs[] = {{kInt64, kRequired}, {kUint8, kRequired}};

  QuantizedAttributes weight;

  explicit EmbeddingNBits(const Attributes& attributes) : weight(attributes) {}

  int64_t run(Context& context) const {
    const Tensor ids = context.input(0), panels = context.input(1);
    require_type("ids", ids, kInt64);
    weight.require_panels(panels, false);
    const int64_t* rows = static_cast<const int64_t*>(ids.data);
    for (int64_t i = 0; i < ids.size(); ++i)
      require(rows[i] >= 0 && rows[i] < weight.N, "id ", rows[i], " is outside the ", weight.N, " rows");
    std::vector<int64_t> shape = ids.shape;
    shape.push_back(weight.K);
    cast24_quantized_rows(rows, ids.size(), static_cast<const uint8_t*>(panels.data), weight.K,
                          static_cast<int>(weight.bits), weight.group, context.output(0, shape));
    return panels.size();
  }
};

}  // namespace cast24
