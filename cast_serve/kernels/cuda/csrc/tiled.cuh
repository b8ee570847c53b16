// y = x W^T + bias for many rows of x: a tiled product on the packed 2:4 weight, in the layout of small_m.cuh, so that one
// copy of it serves all M. W is operand A of mma.sp here, too.
//
// A block makes kWarpsM x 8 kColumnTiles rows and kWarpsN x 16 kRowTiles columns of y, and walks its split of K in steps of
// 64 columns. x comes by cp.async into buffers that are kStages - 1 steps ahead. The weight, which other blocks read at about
// the same time and find in the second-level cache, goes straight into registers, one step ahead.
#pragma once

namespace cast24 {

// The part of a step of the weight that a warp's kRowTiles tiles need of a lane.
template <class T, int kRowTiles>
struct WeightStep {
  unsigned words[kRowTiles][Traits<T>::kWords], e[kRowTiles];
  float scale[kRowTiles][2];  // of rows g and g + 8

  // Tiles past the last one repeat it: their sums are not stored. kOnce: as for load_step.
  template <bool kOnce = false>
  __device__ __forceinline__ void fetch(const LinearArguments& arg, int first_tile, int step, int lane,
                                        bool with_scales = true) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int tile = min(first_tile + r, arg.row_tiles - 1);
      const unsigned at = static_cast<unsigned>(tile) * arg.steps + step;  // a weight has fewer than 2^32 / 32 steps
      load_step<kOnce>(words[r], arg.values, at, lane);
      e[r] = load(arg.metadata + at * 32 + lane);
      if constexpr (Traits<T>::kGroups) {
        if (!with_scales) continue;
        const float* of_tile = arg.w_scale + (tile * arg.groups + step / arg.group_steps) * 16;
        scale[r][0] = load(of_tile + lane / 4);
        scale[r][1] = load(of_tile + lane / 4 + 8);
      }
    }
  }
};

// Of row n of the weight.
template <class Out>
__device__ __forceinline__ float bias_of(Out, const LinearArguments& arg, int n) {
  return arg.bias && n < arg.N ? to_float(Out(), arg.bias[n]) : 0.0f;
}

// 8 rows of x by 8 rows of the weight: lane 4 g + t has row g of the weight and rows 2 t and 2 t + 1 of x. Transposed it has
// two neighbours of y's row g.
template <class Out>
__device__ __forceinline__ void store_8_by_8(Out, const LinearArguments& arg, int first_m, int first_n, float low, float high,
                                             int lane) {
  const unsigned words = from_float(Out(), low) | static_cast<unsigned>(from_float(Out(), high)) << 16;
  const unsigned pair = transposed(words);
  const int m = first_m + lane / 4, n = first_n + 2 * (lane % 4);
  if (m >= arg.M || n >= arg.N) return;
  unsigned short* y = arg.y + static_cast<long long>(m) * arg.N + n;
  if (arg.N % 2 == 0) {
    *reinterpret_cast<unsigned*>(y) = pair;
  } else {
    y[0] = static_cast<unsigned short>(pair & 0xffff);
    if (n + 1 < arg.N) y[1] = static_cast<unsigned short>(pair >> 16);
  }
}

// Grid: (ceil(M / rows), splits, ceil(row_tiles / (kWarpsN kRowTiles))), blocks of 32 kWarpsM kWarpsN threads.
template <class T, class Out, int kColumnTiles, int kRowTiles, int kWarpsM, int kWarpsN>
__device__ __forceinline__ void tiled_linear(const LinearArguments& arg) {
  using Product = typename ProductOf<T, Out>::Type;
  constexpr int kRows = 8 * kColumnTiles * kWarpsM, kThreads = 32 * kWarpsM * kWarpsN;
  constexpr int kStages = kRows > 96 ? 3 : 4;
  static_assert(Traits<T>::kXBytes == 2 && kStages * kRows * 128 <= 48 << 10 && kRows * 8 % kThreads == 0);
  // Of each row 8 chunks of 16 bytes, chunk c at c ^ (row % 8): the same chunk of 8 rows lies in all banks.
  __shared__ uint4 x[kStages][kRows * 8];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int first_row = blockIdx.x * kRows, column = warp % kWarpsM * kColumnTiles;
  const int first_tile = (blockIdx.z * kWarpsN + warp / kWarpsM) * kRowTiles;
  const int begin = blockIdx.y * arg.steps_per_split, end = min(begin + arg.steps_per_split, arg.steps);

  // Rows that x lacks are left as they are: a column of operand B is nobody's but its own.
  auto stage = [&](int slot, int step) {
    if (step < end) {
#pragma unroll
      for (int i = 0; i < kRows * 8 / kThreads; ++i) {
        const int at = i * kThreads + threadIdx.x, row = at / 8, chunk = at % 8, k = step * 64 + 8 * chunk;
        if (first_row + row < arg.M)
          copy_async(&x[slot][row * 8 + (chunk ^ row % 8)], arg.x + (first_row + row) * arg.x_stride + 2 * k, k < arg.K);
      }
    }
    end_copies();
  };

  WeightStep<T, kRowTiles> next;
  next.fetch(arg, first_tile, begin, lane);
  let_next_begin();
  wait_for_previous();
#pragma unroll
  for (int slot = 0; slot < kStages - 1; ++slot) stage(slot, begin + slot);

  float sum[kRowTiles][kColumnTiles][4] = {};
  for (int step = begin, slot = 0; step < end; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all threads' copies of this step are there, and the step before is done with
    stage(slot == 0 ? kStages - 1 : slot - 1, step + kStages - 1);
    const WeightStep<T, kRowTiles> now = next;
    if (step + 1 < end) next.fetch(arg, first_tile, step + 1, lane);
    uint4 a[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) a[r][h] = operand_a(Product(), T(), now.words[r], h);
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
      uint4 b[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        b[h] = load_matrices(&x[slot][((column + c) * 8 + lane % 8) * 8 + ((4 * h + lane / 8) ^ lane % 8)]);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        if constexpr (Traits<T>::kGroups) {
          float of_step[4] = {};
          mma_sp<0>(Product(), of_step, a[r][0], b[0], now.e[r]);
          mma_sp<1>(Product(), of_step, a[r][1], b[1], now.e[r]);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[r][c][i] += of_step[i] * now.scale[r][i / 2];
        } else {
          mma_sp<0>(Product(), sum[r][c], a[r][0], b[0], now.e[r]);
          mma_sp<1>(Product(), sum[r][c], a[r][1], b[1], now.e[r]);
        }
      }
    }
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }

  const int splits = gridDim.y;
  if (splits > 1) {
    const long long block = static_cast<long long>(blockIdx.z) * gridDim.x + blockIdx.x;
    auto partial = [&](int split, int r, int c) {
      return arg.partial +
             (((block * splits + split) * (kThreads / 32) + warp) * (kRowTiles * kColumnTiles) + r * kColumnTiles + c) * 32 +
             lane;
    };
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) *partial(blockIdx.y, r, c) = bits_of(sum[r][c]);
    if (!last_to_arrive(arg.counters + block, splits, reinterpret_cast<unsigned*>(x))) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        for (int i = 0; i < 4; ++i) sum[r][c][i] = 0;
        for (int split = 0; split < splits; ++split) add_bits(sum[r][c], load_shared_by_blocks(partial(split, r, c)));
      }
  }

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first_n = (first_tile + r) * 16 + 8 * half;
      const float bias = bias_of(Out(), arg, first_n + g);
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
        store_8_by_8(Out(), arg, first_row + (column + c) * 8, first_n, sum[r][c][2 * half] + bias,
                     sum[r][c][2 * half + 1] + bias, lane);
    }
}

}  // namespace cast24

#define CAST24_TILED(name, T, Out, column_tiles, row_tiles, warps_m, warps_n, blocks)                           \
  extern "C" __global__ void __launch_bounds__(32 * warps_m * warps_n, blocks)                                  \
      name(const cast24::LinearArguments arg) {                                                                 \
    cast24::tiled_linear<cast24::T, cast24::Out, column_tiles, row_tiles, warps_m, warps_n>(arg);               \
  }
