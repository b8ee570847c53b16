// The GPU's operator for ONNX Runtime's CPU provider, with a driver of its own.
#include "ort/gpu_linear.h"

namespace cast24 {
static CustomOp<Sparse24MatMulGpu> op;
}

extern "C" __attribute__((visibility("default"))) cast24::OrtStatus* RegisterCustomOps(cast24::OrtSessionOptions* options,
                                                                                       const cast24::OrtApiBase* base) {
  const cast24::OrtApi api(base->GetApi(cast24::kOrtApiVersion));
  cast24::OrtCustomOpDomain* domain = nullptr;
  if (cast24::OrtStatus* status = api.CreateCustomOpDomain("cast24", &domain)) return status;
  if (cast24::OrtStatus* status = api.CustomOpDomain_Add(domain, &cast24::op)) return status;
  return api.AddCustomOpDomain(options, domain);
}
