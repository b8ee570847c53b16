// The kernels' own source, compiled for the CPU, behind one C function.
#include "emulation.h"
// clang-format off
#include "small_m.cuh"
#include "variants.inc"
// clang-format on

using cast24::LinearArguments;

struct Kernel {
  const char* name;
  void (*run)(LinearArguments);
  int threads;
};
static const Kernel kKernels[] = {CAST24_VARIANTS};

// Runs a kernel over the grid, blocks in random order. Each byte of values and metadata has to be read exactly
// `weight_reads` times; returns 0, 1 if one was not, 2 if there is no such kernel.
extern "C" int emulate(const char* name, const LinearArguments* arguments, int grid_x, int grid_y, int grid_z,
                       int64_t values_bytes, int64_t metadata_bytes, int64_t x_bytes, int weight_reads, unsigned seed) {
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name)) continue;
    const LinearArguments& arg = *arguments;
    auto region = [](const void* data, int64_t bytes) {
      return emulation::Region{static_cast<const unsigned char*>(data), static_cast<size_t>(bytes),
                               std::vector<unsigned char>(bytes)};
    };
    emulation::regions = {region(arg.values, values_bytes), region(arg.metadata, metadata_bytes),
                          region(arg.x, x_bytes)};
    emulation::body = [&] { kernel.run(arg); };
    gridDim = {grid_x, grid_y, grid_z};
    std::mt19937 random(seed);
    std::vector<int> blocks(grid_x * grid_y * grid_z);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int>(i);
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (int block : blocks) {
      blockIdx = {block % grid_x, block / grid_x % grid_y, block / grid_x / grid_y};
      emulation::run_block(kernel.threads, random);
    }
    for (int i = 0; i < 2; ++i)
      for (unsigned char reads : emulation::regions[i].reads)
        if (reads != weight_reads) return 1;
    return 0;
  }
  return 2;
}
