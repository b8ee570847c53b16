// The part of ONNX Runtime's C ABI that custom ops need, written from its documentation so that building needs no ONNX
// Runtime headers and no link. OrtApi is an append-only table of function pointers: a slot number, once released, never
// changes. All slots used here exist since version 1.17 (API 17).
#pragma once

#include <cstddef>
#include <cstdint>

namespace cast24 {

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorShape;  // OrtTensorTypeAndShapeInfo
struct OrtCustomOpDomain;
struct OrtSessionOptions;

constexpr uint32_t kOrtApiVersion = 17;

enum OrtErrorCode : int { kOrtFail = 1, kOrtInvalidArgument = 2 };

enum OrtElementType : int {
  kAnyType = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
  kUint32 = 12,
  kBFloat16 = 16
};

enum OrtCharacteristic : int { kRequired = 0, kOptional = 1 };

enum OrtMemoryType : int { kProvidersMemory = 0, kCpuMemory = -2 };

struct OrtApiBase {
  const void* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Every call that returns a status returns nullptr on success.
class OrtApi {
 public:
  explicit OrtApi(const void* table) : table_(static_cast<void* const*>(table)) {}

  OrtStatus* CreateStatus(OrtErrorCode code, const char* message) const {
    return slot<OrtStatus* (*)(int, const char*)>(0)(code, message);
  }
  OrtStatus* CreateCustomOpDomain(const char* domain, OrtCustomOpDomain** out) const {
    return slot<OrtStatus* (*)(const char*, OrtCustomOpDomain**)>(26)(domain, out);
  }
  OrtStatus* CustomOpDomain_Add(OrtCustomOpDomain* domain, const struct OrtCustomOp* op) const {
    return slot<OrtStatus* (*)(OrtCustomOpDomain*, const OrtCustomOp*)>(27)(domain, op);
  }
  OrtStatus* AddCustomOpDomain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return slot<OrtStatus* (*)(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }
  OrtStatus* GetTensorMutableData(OrtValue* value, void** out) const {
    return slot<OrtStatus* (*)(OrtValue*, void**)>(51)(value, out);
  }
  OrtStatus* GetTensorElementType(const OrtTensorShape* info, int* out) const {
    return slot<OrtStatus* (*)(const OrtTensorShape*, int*)>(60)(info, out);
  }
  OrtStatus* GetDimensionsCount(const OrtTensorShape* info, size_t* out) const {
    return slot<OrtStatus* (*)(const OrtTensorShape*, size_t*)>(61)(info, out);
  }
  OrtStatus* GetDimensions(const OrtTensorShape* info, int64_t* dims, size_t count) const {
    return slot<OrtStatus* (*)(const OrtTensorShape*, int64_t*, size_t)>(62)(info, dims, count);
  }
  OrtStatus* GetTensorTypeAndShape(const OrtValue* value, OrtTensorShape** out) const {
    return slot<OrtStatus* (*)(const OrtValue*, OrtTensorShape**)>(65)(value, out);
  }
  OrtStatus* KernelInfoGetAttribute_float(const OrtKernelInfo* info, const char* name, float* out) const {
    return slot<OrtStatus* (*)(const OrtKernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  OrtStatus* KernelInfoGetAttribute_int64(const OrtKernelInfo* info, const char* name, int64_t* out) const {
    return slot<OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  OrtStatus* KernelInfoGetConstantInput_tensor(const OrtKernelInfo* info, size_t index, int* constant,
                                               const OrtValue** out) const {
    return slot<OrtStatus* (*)(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(249)(info, index, constant, out);
  }
  OrtStatus* KernelContext_GetInputCount(const OrtKernelContext* context, size_t* out) const {
    return slot<OrtStatus* (*)(const OrtKernelContext*, size_t*)>(88)(context, out);
  }
  OrtStatus* KernelContext_GetInput(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
    return slot<OrtStatus* (*)(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, out);
  }
  OrtStatus* KernelContext_GetOutput(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank,
                                     OrtValue** out) const {
    return slot<OrtStatus* (*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(context, index, dims,
                                                                                                  rank, out);
  }
  OrtStatus* KernelContext_GetGPUComputeStream(const OrtKernelContext* context, void** out) const {
    return slot<OrtStatus* (*)(const OrtKernelContext*, void**)>(193)(context, out);
  }
  void ReleaseStatus(OrtStatus* status) const { slot<void (*)(OrtStatus*)>(93)(status); }
  void ReleaseTensorTypeAndShapeInfo(OrtTensorShape* info) const { slot<void (*)(OrtTensorShape*)>(99)(info); }
  OrtStatus* KernelContext_ParallelFor(const OrtKernelContext* context, void (*fn)(void*, size_t), size_t total,
                                       size_t batches, void* argument) const {
    return slot<OrtStatus* (*)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, fn, total, batches, argument);
  }

 private:
  template <typename Function>
  Function slot(int index) const {
    return reinterpret_cast<Function>(table_[index]);
  }

  void* const* table_;
};

// Layout of OrtCustomOp up to API version 17; ONNX Runtime reads no field beyond `version`'s.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const void* api, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const void* api, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, void* context);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};
static_assert(sizeof(OrtCustomOp) == 22 * sizeof(void*), "no padding but after version");

}  // namespace cast24
