// The dense weight of a packed one, for products that are better off with it. 16-bit types.
#pragma once

namespace cast24 {

struct ExpandArguments {
  const uint4* values;      // as in LinearArguments
  const unsigned* metadata;
  unsigned short* dense;    // [N, K]
  int N, K, row_tiles, steps;
};

// One warp for each weight tile, in a grid of ceil(2 row_tiles steps / 8) blocks of 256 threads.
__device__ __forceinline__ void expand_tiles(const ExpandArguments& arg) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const long long tile = static_cast<long long>(blockIdx.x) * 8 + threadIdx.x / 32, step = tile / 2;
  if (step >= static_cast<long long>(arg.row_tiles) * arg.steps) return;
  const int h = static_cast<int>(tile % 2), row = static_cast<int>(step / arg.steps) * 16 + g;
  const int column = static_cast<int>(step % arg.steps) * 64 + 32 * h + 4 * t;
  const uint4 v = load_once(arg.values + tile * 32 + lane);
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {  // rows g and g + 8, then the same 16 columns further
    const unsigned kept = quarter == 0 ? v.x : quarter == 1 ? v.y : quarter == 2 ? v.z : v.w;
    const int n = row + quarter % 2 * 8, k = column + quarter / 2 * 16;
    const unsigned where = load(arg.metadata + step * 32 + 4 * g + 2 * h + quarter / 2) >> (quarter % 2 * 16 + 4 * t);
    const unsigned long long group = static_cast<unsigned long long>(kept & 0xffff) << (where & 3) * 16 |
                                     static_cast<unsigned long long>(kept >> 16) << (where >> 2 & 3) * 16;
    if (n < arg.N && k < arg.K)
      *reinterpret_cast<unsigned long long*>(arg.dense + static_cast<long long>(n) * arg.K + k) = group;
  }
}

}  // namespace cast24

#define CAST24_EXPAND                                                                       \
  extern "C" __global__ void __launch_bounds__(256) expand(const cast24::ExpandArguments arg) { \
    cast24::expand_tiles(arg);                                                                    \
  }
