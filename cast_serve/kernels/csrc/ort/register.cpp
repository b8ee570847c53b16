// Entry points for ONNX Runtime (RegisterCustomOps) and for whoever asks what a session executed.
#include <cstring>

#include "attention_op.h"
#include "custom_op.h"
#include "gpu_linear.h"
#include "linear_ops.h"
#include "quantized_ops.h"

namespace cast24 {
namespace {

template <typename Op>
CustomOp<Op> op;

template <typename... Op>
struct Registry {
  static OrtStatus* add_to(const OrtApi& api, OrtCustomOpDomain* domain) {
    OrtStatus* status = nullptr;
    ((status = status ? status : api.CustomOpDomain_Add(domain, &op<Op>)), ...);
    return status;
  }
  // What the op called `name` has executed; nullptr if there is none.
  static const Executed* executed(const char* name) {
    const Executed* found = nullptr;
    ((found = std::strcmp(name, Op::name) == 0 ? &CustomOp<Op>::executed : found), ...);
    return found;
  }
};

using Ops = Registry<Sparse24MatMul, Sparse24MatMulNBits, DenseLinear, DenseNBits, EmbeddingNBits, PagedAttention, Sparse24MatMulGpu>;

OrtStatus* register_ops(const OrtApi& api, OrtSessionOptions* options) {
  // Never released, as sessions keep pointing at it; and not shared, as it belongs to the runtime that asks.
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* status = api.CreateCustomOpDomain("cast24", &domain)) return status;
  if (OrtStatus* status = Ops::add_to(api, domain)) return status;
  return api.AddCustomOpDomain(options, domain);
}

}  // namespace
}  // namespace cast24

extern "C" {

CAST24_API cast24::OrtStatus* RegisterCustomOps(cast24::OrtSessionOptions* options, const cast24::OrtApiBase* base) {
  const void* table = base->GetApi(cast24::kOrtApiVersion);
  if (table == nullptr) return nullptr;  // older than 1.17: it says itself that it cannot serve this version
  return cast24::register_ops(cast24::OrtApi(table), options);
}

// Nodes of op `name` ("Sparse24MatMul" and so on), in all sessions now loaded in this process, that have executed at least
// once; *weight_bytes is set to the bytes of the weights they read. -1 if there is no such op.
CAST24_API int64_t cast24_ort_executed(const char* name, int64_t* weight_bytes) {
  const cast24::Executed* executed = cast24::Ops::executed(name);
  if (executed == nullptr) return -1;
  *weight_bytes = executed->weight_bytes;
  return executed->nodes;
}
}
