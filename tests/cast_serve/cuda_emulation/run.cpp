// The kernels' own source, compiled for the CPU, behind one C function.
#include "hopper.h"
// clang-format off
#include "weights.cuh"
#include "small_m.cuh"
#include "tiled.cuh"
#include "warpgroup.cuh"
#include "expand.cuh"
#include "quantize.cuh"
#include "kernels.inc"
// clang-format on

struct Kernel {
  const char* name;
  void (*run)(const void* arguments);
};
template <class Arguments>
Arguments argument_of(void (*)(Arguments));
// Defines an entry of the table for a kernel with one structure as its parameter.
#define ENTRY(kernel) \
  { #kernel, [](const void* arguments) { kernel(*static_cast<const decltype(argument_of(kernel))*>(arguments)); } }
static const Kernel kKernels[] = {KERNELS};

// Runs a kernel over the grid, blocks or clusters of `cluster` neighbours in random order, and writes how often each byte of
// the readable regions was read to `reads`, one region after the other; with -1 regions anything may be read. Returns 0, or 1
// if there is no such kernel.
extern "C" int emulate(const char* name, const int* grid, int threads, int cluster, int shared_bytes, const void* arguments,
                       int regions, const void* const* starts, const int64_t* sizes, unsigned char* reads, unsigned seed) {
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name)) continue;
    emulation::checked = regions >= 0;
    emulation::regions.clear();
    for (int i = 0; i < regions; ++i) {
      emulation::regions.push_back({static_cast<const unsigned char*>(starts[i]), static_cast<size_t>(sizes[i]), reads});
      reads += sizes[i];
    }
    emulation::body = [&] { kernel.run(arguments); };
    gridDim = {grid[0], grid[1], grid[2]};
    std::mt19937 random(seed);
    std::vector<int> firsts;
    for (int first = 0; first < grid[0] * grid[1] * grid[2]; first += cluster) firsts.push_back(first);
    std::shuffle(firsts.begin(), firsts.end(), random);
    for (int first : firsts) {
      std::vector<Dim> blocks;
      for (int block = first; block < first + cluster; ++block)
        blocks.push_back({block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]});
      emulation::begin_cluster(cluster, threads, shared_bytes, random);
      emulation::run_blocks(blocks, threads, random, [&] { emulation::deliver(random); });
    }
    return 0;
  }
  return 1;
}
