// A custom op is a struct with: provider and output type (of CpuOp, or its own), name, inputs (types, which are optional,
// and where they lie), a constructor that reads attributes, and run(Context&). CustomOp<Op> turns it into the table of callbacks that ONNX Runtime wants. Everything thrown inside
// becomes an error status with the op's name before the message.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../cast24.h"
#include "ort_api.h"
#include "resident_weights.h"

namespace cast24 {

inline void check(const OrtApi& api, OrtStatus* status, const char* what) {
  if (status == nullptr) return;
  api.ReleaseStatus(status);
  throw std::runtime_error(what);
}

struct Tensor {
  void* data = nullptr;
  OrtElementType type = kAnyType;
  std::vector<int64_t> shape;

  explicit operator bool() const { return data != nullptr || !shape.empty(); }
  float* f32() const { return static_cast<float*>(data); }
  int64_t size() const {
    int64_t n = 1;
    for (int64_t dim : shape) n *= dim;
    return n;
  }
};

// A part of a message.
inline std::string text(const char* part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }
inline std::string text(const std::vector<int64_t>& shape) {
  std::string all = "[";
  for (size_t i = 0; i < shape.size(); ++i) all += (i ? ", " : "") + std::to_string(shape[i]);
  return all + "]";
}

// Throws the message unless the condition holds. It is put together only then, as this is called for every node of every step.
template <class... Part>
void require(bool condition, const Part&... message) {
  if (!condition) throw std::invalid_argument((text(message) + ...));
}

inline void require_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  if (tensor.shape.size() == expected.size() && std::equal(expected.begin(), expected.end(), tensor.shape.begin())) return;
  require(false, name, " has shape ", tensor.shape, ", expected ", std::vector<int64_t>(expected));
}

inline void require_type(const char* name, const Tensor& tensor, OrtElementType expected) {
  require(tensor.type == expected, name, " has element type ", tensor.type, " of ONNX, expected ", expected);
}

// True for bf16, false for float32; refuses other types.
inline bool bf16_or_float(const char* name, const Tensor& tensor) {
  if (tensor.type == kBFloat16) return true;
  require_type(name, tensor, kFloat);
  return false;
}

// x is [..., K].
inline void require_columns(const Tensor& x, int64_t K) {
  require(!x.shape.empty() && x.shape.back() == K, "x has shape ", x.shape, ", expected [..., ", K, "]");
}

// The tensor that a value holds.
inline Tensor tensor_of(const OrtApi& api, const OrtValue* value) {
  Tensor tensor;
  OrtTensorShape* info = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &info), "cannot read the shape of an input");
  int type = 0;
  size_t rank = 0;
  OrtStatus* status = api.GetTensorElementType(info, &type);
  if (status == nullptr) status = api.GetDimensionsCount(info, &rank);
  tensor.shape.resize(rank);
  if (status == nullptr) status = api.GetDimensions(info, tensor.shape.data(), rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(api, status, "cannot read the shape of an input");
  tensor.type = static_cast<OrtElementType>(type);
  check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data), "cannot read an input");
  return tensor;
}

// What is known of a node before it runs: its attributes and its constant inputs.
class Attributes {
 public:
  Attributes(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  // Input `index` if it is a constant; else an empty Tensor.
  Tensor constant(size_t index) const {
    int constant = 0;
    const OrtValue* value = nullptr;
    check(api_, api_.KernelInfoGetConstantInput_tensor(info_, index, &constant, &value), "cannot read a constant input");
    return constant ? tensor_of(api_, value) : Tensor{};
  }

  // A copy of it on huge pages.
  ResidentWeights resident(size_t index) const {
    const Tensor tensor = constant(index);
    return tensor ? ResidentWeights(tensor.data, tensor.size() * element_bytes(tensor.type)) : ResidentWeights();
  }

  int64_t integer(const char* name) const {
    int64_t value = 0;
    check(api_, api_.KernelInfoGetAttribute_int64(info_, name, &value), (std::string("no attribute ") + name).c_str());
    return value;
  }
  int64_t integer(const char* name, int64_t otherwise) const {
    return present(api_.KernelInfoGetAttribute_int64(info_, name, &otherwise)), otherwise;
  }
  float real(const char* name, float otherwise) const {
    return present(api_.KernelInfoGetAttribute_float(info_, name, &otherwise)), otherwise;
  }

 private:
  static size_t element_bytes(OrtElementType type) {
    if (type == kUint8) return 1;
    if (type == kBFloat16) return 2;
    require(type == kFloat || type == kUint32, "a weight has element type ", type, " of ONNX");
    return 4;
  }
  void present(OrtStatus* status) const {
    if (status != nullptr) api_.ReleaseStatus(status);
  }

  OrtApi api_;
  const OrtKernelInfo* info_;
};

// Inputs, outputs and the thread pool of one call.
class Context {
 public:
  Context(const OrtApi& api, OrtKernelContext* context) : api_(api), context_(context) {
    check(api_, api_.KernelContext_GetInputCount(context_, &inputs_), "cannot count the inputs");
  }

  // An input that is absent or left out is an empty Tensor.
  Tensor input(size_t index) const {
    const OrtValue* value = nullptr;
    if (index >= inputs_) return {};
    check(api_, api_.KernelContext_GetInput(context_, index, &value), "cannot read an input");
    return value == nullptr ? Tensor{} : tensor_of(api_, value);
  }

  float* output(size_t index, const std::vector<int64_t>& shape) const {
    return static_cast<float*>(output_data(index, shape));
  }
  void* output_data(size_t index, const std::vector<int64_t>& shape) const {
    OrtValue* value = nullptr;
    void* data = nullptr;
    check(api_, api_.KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value), "cannot make an output");
    check(api_, api_.GetTensorMutableData(value, &data), "cannot make an output");
    return data;
  }

  // The stream that a GPU provider works on.
  void* stream() const {
    void* stream = nullptr;
    check(api_, api_.KernelContext_GetGPUComputeStream(context_, &stream), "the provider has no stream");
    return stream;
  }

  // A cast24_parallel_for on ONNX Runtime's own intra-op threads, so that no second pool competes with it for cores.
  static void parallel_for(void* self, cast24_task task, void* argument, int64_t n) {
    // A few ranges for every thread let a fast thread take over from one that the system has delayed.
    static const int64_t most_ranges = 4 * std::max(1u, std::thread::hardware_concurrency());
    const Context& context = *static_cast<Context*>(self);
    Ranges ranges{task, argument, n, std::min(n, most_ranges)};
    if (ranges.count <= 1) {
      if (n > 0) task(argument, 0, n);
      return;
    }
    const size_t count = static_cast<size_t>(ranges.count);
    check(context.api_, context.api_.KernelContext_ParallelFor(context.context_, Ranges::run, count, count, &ranges),
          "cannot run in parallel");
  }

 private:
  struct Ranges {
    cast24_task task;
    void* argument;
    int64_t n, count;

    static void run(void* self, size_t index) {
      const Ranges& r = *static_cast<Ranges*>(self);
      const int64_t i = static_cast<int64_t>(index);
      r.task(r.argument, r.n * i / r.count, r.n * (i + 1) / r.count);
    }
  };

  OrtApi api_;
  OrtKernelContext* context_;
  size_t inputs_ = 0;
};

// What this library's kernels of one op have done, for cast24_ort_executed: proof of what a loaded session runs.
struct Executed {
  std::atomic<int64_t> nodes{0};         // live kernel instances that have run at least once
  std::atomic<int64_t> weight_bytes{0};  // bytes of constant inputs they read
};

template <typename Op>
struct CustomOp : OrtCustomOp {
  static inline Executed executed;

  struct Kernel {
    OrtApi api;
    Op op;
    std::atomic<bool> counted{false};
    int64_t weight_bytes = 0;

    ~Kernel() {
      if (!counted) return;
      executed.nodes -= 1;
      executed.weight_bytes -= weight_bytes;
    }
  };

  CustomOp() : OrtCustomOp{} {
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp*) { return Op::name; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return Op::provider; };
    GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Op::inputs); };
    GetInputType = [](const OrtCustomOp*, size_t i) -> int { return Op::inputs[i].type; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return Op::inputs[i].characteristic; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetOutputType = [](const OrtCustomOp*, size_t) -> int { return Op::output; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t i) -> int { return Op::inputs[i].memory; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
    CreateKernelV2 = create;
    KernelComputeV2 = compute;
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

 private:
  template <typename Body>
  static OrtStatus* guarded(const OrtApi& api, Body&& body) {
    try {
      body();
      return nullptr;
    } catch (const std::invalid_argument& error) {
      return api.CreateStatus(kOrtInvalidArgument, (std::string(Op::name) + ": " + error.what()).c_str());
    } catch (const std::exception& error) {
      return api.CreateStatus(kOrtFail, (std::string(Op::name) + ": " + error.what()).c_str());
    }
  }

  static OrtStatus* create(const OrtCustomOp*, const void* table, const OrtKernelInfo* info, void** kernel) {
    const OrtApi api(table);
    return guarded(api, [&] { *kernel = new Kernel{api, Op(Attributes(api, info))}; });
  }

  static OrtStatus* compute(void* self, OrtKernelContext* ort_context) {
    Kernel& kernel = *static_cast<Kernel*>(self);
    return guarded(kernel.api, [&] {
      Context context(kernel.api, ort_context);
      const int64_t weight_bytes = kernel.op.run(context);
      if (!kernel.counted.exchange(true)) {
        kernel.weight_bytes = weight_bytes;
        executed.nodes += 1;
        executed.weight_bytes += weight_bytes;
      }
    });
  }
};

struct Input {
  OrtElementType type;
  OrtCharacteristic characteristic;
  OrtMemoryType memory = kProvidersMemory;
};

struct CpuOp {
  static constexpr const char* provider = "CPUExecutionProvider";
  static constexpr OrtElementType output = kFloat;
};

}  // namespace cast24
