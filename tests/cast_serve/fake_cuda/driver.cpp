// A CUDA driver without a GPU: memory is the CPU's, and kernels run in the emulation. Defined by the build: EMULATION, the
// emulation's library; MULTIPROCESSORS. The variable FAKE_CUDA_TYPES is what precedes a kernel's name in there.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

using Emulate = int (*)(const char* name, const int* grid, int threads, int cluster, int shared_bytes, const void* arguments,
                        int regions, const void* const* starts, const int64_t* sizes, unsigned char* reads, unsigned seed);

Emulate emulate = nullptr;
std::vector<std::string> launches;

}  // namespace

extern "C" {

int cuCtxGetCurrent(void** context) { return *context = &launches, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = MULTIPROCESSORS, 0; }
int cuModuleLoadData(void** module, const void* image) {
  emulate = reinterpret_cast<Emulate>(dlsym(dlopen(EMULATION, RTLD_NOW), "emulate"));
  *module = strdup(static_cast<const char*>(image));
  return emulate == nullptr;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (std::strstr(static_cast<char*>(module), name) == nullptr) return 500;
  *function = strdup(name);
  return 0;
}
int cuMemAlloc_v2(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*memory, 0xff, bytes);
  return 0;
}
int cuMemsetD8Async(void* memory, unsigned char value, size_t bytes, void*) { return std::memset(memory, value, bytes), 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned, void*,
                   void** arguments, void**) {
  const char* name = static_cast<const char*>(function);
  const int grid[] = {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)};
  launches.push_back(std::string(name) + " " + std::to_string(x) + " " + std::to_string(y) + " " + std::to_string(z));
  return emulate((std::string(std::getenv("FAKE_CUDA_TYPES")) + "_" + name).c_str(), grid, static_cast<int>(threads), 1, 0,
                 arguments[0], -1, nullptr, nullptr, nullptr, 0);
}

// The kernel and grid of launch number `i`; nullptr after the last one.
const char* launched(int i) { return i < static_cast<int>(launches.size()) ? launches[i].c_str() : nullptr; }
}
