// Entry points for ONNX Runtime (RegisterCustomOps) and for whoever asks what a session executed.
#include <cstring>

#include "attention_op.h"
#include "custom_op.h"
#include "linear_ops.h"

namespace cast24 {
namespace {

CustomOp<Sparse24MatMul> sparse_op;
CustomOp<DenseLinear> dense_op;
CustomOp<PagedAttention> attention_op;

OrtStatus* register_ops(const OrtApi& api, OrtSessionOptions* options) {
  // Never released, as sessions keep pointing at it; and not shared, as it belongs to the runtime that asks.
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* status = api.CreateCustomOpDomain("cast24", &domain)) return status;
  for (const OrtCustomOp* op : {static_cast<OrtCustomOp*>(&sparse_op), static_cast<OrtCustomOp*>(&dense_op),
                                static_cast<OrtCustomOp*>(&attention_op)}) {
    if (OrtStatus* status = api.CustomOpDomain_Add(domain, op)) return status;
  }
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

// Nodes of op `name` ("Sparse24MatMul", "DenseLinear", "PagedAttention"), in all sessions now loaded in this process, that
// have executed at least once; *weight_bytes is set to the bytes of the weights they read. -1 if there is no such op.
CAST24_API int64_t cast24_ort_executed(const char* name, int64_t* weight_bytes) {
  using namespace cast24;
  const Executed* executed = nullptr;
  if (std::strcmp(name, Sparse24MatMul::name) == 0) executed = &CustomOp<Sparse24MatMul>::executed;
  if (std::strcmp(name, DenseLinear::name) == 0) executed = &CustomOp<DenseLinear>::executed;
  if (std::strcmp(name, PagedAttention::name) == 0) executed = &CustomOp<PagedAttention>::executed;
  if (executed == nullptr) return -1;
  *weight_bytes = executed->weight_bytes;
  return executed->nodes;
}
}
