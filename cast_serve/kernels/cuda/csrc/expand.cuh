// The dense weight of a packed one, for products that are better off with it: of types that are multiplied in 16 bits.
#pragma once

namespace cast24 {

struct ExpandArguments {
  const uint4* values;  // these as in LinearArguments
  const unsigned* metadata;
  const float* w_scale;
  unsigned short* dense;  // [N, K]
  int N, K, row_tiles, steps, groups, group_steps;
};

// One warp for each step of a weight tile, in a grid of ceil(row_tiles steps / 8) blocks of 256 threads.
template <class T, class Out>
__device__ __forceinline__ void expand_step(const ExpandArguments& arg) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const long long at = static_cast<long long>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (at >= static_cast<long long>(arg.row_tiles) * arg.steps) return;
  const int tile = static_cast<int>(at / arg.steps), step = static_cast<int>(at % arg.steps);
  unsigned words[Traits<T>::kWords];
  load_step(words, arg.values, at, lane);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint4 a = operand_a(Out(), T(), words, h);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {  // rows g and g + 8, then the same 16 columns further
      unsigned kept = quarter == 0 ? a.x : quarter == 1 ? a.y : quarter == 2 ? a.z : a.w;
      const int row = g + quarter % 2 * 8, n = tile * 16 + row, k = step * 64 + 32 * h + quarter / 2 * 16 + 4 * t;
      if constexpr (Traits<T>::kGroups)
        kept = scaled(Out(), kept, load(arg.w_scale + (tile * arg.groups + step / arg.group_steps) * 16 + row));
      const unsigned where = load(arg.metadata + at * 32 + 4 * g + 2 * h + quarter / 2) >> (quarter % 2 * 16 + 4 * t);
      const unsigned long long group = static_cast<unsigned long long>(kept & 0xffff) << (where & 3) * 16 |
                                       static_cast<unsigned long long>(kept >> 16) << (where >> 2 & 3) * 16;
      if (n < arg.N && k < arg.K)
        *reinterpret_cast<unsigned long long*>(arg.dense + static_cast<long long>(n) * arg.K + k) = group;
    }
  }
}

}  // namespace cast24

#define CAST24_EXPAND(T, Out)                                                                   \
  extern "C" __global__ void __launch_bounds__(256) expand(const cast24::ExpandArguments arg) { \
    cast24::expand_step<cast24::T, cast24::Out>(arg);                                           \
  }
