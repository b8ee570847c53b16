// The few functions of the CUDA driver that launching a kernel needs, looked up when the first one is: the library is
// built, and runs on CPUs, without CUDA.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#ifndef CAST24_CUDA_DRIVER
#define CAST24_CUDA_DRIVER "libcuda.so.1"
#endif

namespace cast24 {

// Every call returns 0 on success. Work goes to the thread's current context: ONNX Runtime's while it runs a node.
class CudaDriver {
 public:
  static const CudaDriver& get() {
    static const CudaDriver driver;
    return driver;
  }

  void* current_context() const {
    void* context = nullptr;
    check(ctx_get_current_(&context), "cuCtxGetCurrent");
    if (context == nullptr) throw std::runtime_error("ONNX Runtime runs this node without a CUDA context");
    return context;
  }
  int multiprocessors() const {
    constexpr int kMultiprocessorCount = 16;
    int device = 0, count = 0;
    check(ctx_get_device_(&device), "cuCtxGetDevice");
    check(device_get_attribute_(&count, kMultiprocessorCount, device), "cuDeviceGetAttribute");
    return count;
  }
  // `code` is PTX that ends with a 0; the driver keeps what it compiles in a cache of its own.
  void* load_module(const char* code) const {
    void* module = nullptr;
    check(module_load_data_(&module, code), "cuModuleLoadData");
    return module;
  }
  void* function(void* module, const std::string& name) const {
    void* function = nullptr;
    check(module_get_function_(&function, module, name.c_str()), "cuModuleGetFunction");
    return function;
  }
  // Memory that is zeros for what comes next on the stream.
  void* allocate(size_t bytes, void* stream) const {
    void* memory = nullptr;
    check(mem_alloc_(&memory, bytes), "cuMemAlloc");
    check(memset_(memory, 0, bytes, stream), "cuMemsetD8Async");
    return memory;
  }
  // A kernel with one structure as its parameter.
  void launch(void* function, const unsigned (&grid)[3], unsigned threads, void* stream, const void* argument) const {
    void* arguments[] = {const_cast<void*>(argument)};
    check(launch_kernel_(function, grid[0], grid[1], grid[2], threads, 1, 1, 0, stream, arguments, nullptr),
          "cuLaunchKernel");
  }

 private:
  CudaDriver() : library_(dlopen(CAST24_CUDA_DRIVER, RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw std::runtime_error(std::string("there is no CUDA driver (") + dlerror() + ")");
    find(ctx_get_current_, "cuCtxGetCurrent");
    find(ctx_get_device_, "cuCtxGetDevice");
    find(device_get_attribute_, "cuDeviceGetAttribute");
    find(module_load_data_, "cuModuleLoadData");
    find(module_get_function_, "cuModuleGetFunction");
    find(mem_alloc_, "cuMemAlloc_v2");
    find(memset_, "cuMemsetD8Async");
    find(launch_kernel_, "cuLaunchKernel");
  }

  template <typename Function>
  void find(Function& function, const char* name) const {
    function = reinterpret_cast<Function>(dlsym(library_, name));
    if (function == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  }
  static void check(int error, const char* call) {
    if (error != 0) throw std::runtime_error(std::string(call) + " failed with CUDA error " + std::to_string(error));
  }

  void* library_;
  int (*ctx_get_current_)(void** context);
  int (*ctx_get_device_)(int* device);
  int (*device_get_attribute_)(int* value, int attribute, int device);
  int (*module_load_data_)(void** module, const void* image);
  int (*module_get_function_)(void** function, void* module, const char* name);
  int (*mem_alloc_)(void** memory, size_t bytes);
  int (*memset_)(void* memory, unsigned char value, size_t bytes, void* stream);
  int (*launch_kernel_)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** arguments, void** extra);
};

}  // namespace cast24
