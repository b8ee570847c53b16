// y = x W^T + bias for many rows of x: a tiled product on the packed 2:4 weight, in the layout of small_m.cuh, so that one
// copy of it serves all M. W is operand A of mma.sp here, too.
//
// A block makes kWarpsM x 8 kColumnTiles rows and kWarpsN x 16 kRowTiles columns of y, and walks its split of K in turns of
// 128 bytes of x: one step of the weight, or two where x was rounded to 8 bits. x comes by cp.async into buffers that are
// kStages - 1 turns ahead. The weight, which other blocks read at about the same time and find in the second-level cache,
// goes straight into registers, one turn ahead.
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

// Scales of the two rows of 8 of x that a lane has sums of; 1 where x was not rounded.
struct Scales {
  float low, high;
};
template <bool kRounded>
__device__ __forceinline__ Scales scales_of(const LinearArguments& arg, int first_m, int lane) {
  if constexpr (!kRounded) return {1.0f, 1.0f};
  const int m = first_m + 2 * (lane % 4);
  return {arg.x_scale[min(m, arg.M - 1)], arg.x_scale[min(m + 1, arg.M - 1)]};
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
  constexpr int kSteps = Traits<T>::kSteps;
  constexpr bool kIn8Bits = Traits<T>::kXBytes == 1;
  static_assert(kStages * kRows * 128 <= 48 << 10 && kRows * 8 % kThreads == 0);
  // Of each row 8 chunks of 16 bytes, chunk c at c ^ (row % 8): the same chunk of 8 rows lies in all banks.
  __shared__ uint4 x[kStages][kRows * 8];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int first_row = blockIdx.x * kRows, column = warp % kWarpsM * kColumnTiles;
  const int first_tile = (blockIdx.z * kWarpsN + warp / kWarpsM) * kRowTiles;
  const int turns = (arg.steps_per_split + kSteps - 1) / kSteps, begin = blockIdx.y * turns;
  const int end = min(begin + turns, (arg.steps + kSteps - 1) / kSteps);

  // Rows that x lacks are left as they are: a column of operand B is nobody's but its own.
  auto stage = [&](int slot, int turn) {
    if (turn < end) {
#pragma unroll
      for (int i = 0; i < kRows * 8 / kThreads; ++i) {
        const int at = i * kThreads + threadIdx.x, row = at / 8, chunk = at % 8, byte = turn * 128 + 16 * chunk;
        if (first_row + row < arg.M)
          copy_async(&x[slot][row * 8 + (chunk ^ row % 8)], arg.x + (first_row + row) * arg.x_stride + byte,
                     byte < arg.K * Traits<T>::kXBytes);
      }
    }
    end_copies();
  };

  WeightStep<T, kRowTiles> next[kSteps];
  auto fetch = [&](int turn) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)  // where the last turn's second step is missing x is zeros
      next[k].fetch(arg, first_tile, min(turn * kSteps + k, arg.steps - 1), lane);
  };
  fetch(begin);
  let_next_begin();
  wait_for_previous();
#pragma unroll
  for (int slot = 0; slot < kStages - 1; ++slot) stage(slot, begin + slot);

  typename Traits<T>::Sum sum[kRowTiles][kColumnTiles][4] = {};
  for (int turn = begin, slot = 0; turn < end; ++turn) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all threads' copies of this turn are there, and the turn before is done with
    stage(slot == 0 ? kStages - 1 : slot - 1, turn + kStages - 1);
    WeightStep<T, kRowTiles> now[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) now[k] = next[k];
    if (turn + 1 < end) fetch(turn + 1);
    uint4 a[kRowTiles][2];
    unsigned e[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if constexpr (kIn8Bits) {
          a[r][h] = operand_of_step(T(), now[h].words[r]);
          e[r][h] = metadata_of_step(now[h].e[r], lane);
        } else {
          a[r][h] = operand_a(Product(), T(), now[0].words[r], h);
          e[r][h] = now[0].e[r];
        }
      }
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
          mma_sp<0>(Product(), of_step, a[r][0], b[0], e[r][0]);
          mma_sp<1>(Product(), of_step, a[r][1], b[1], e[r][1]);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[r][c][i] += of_step[i] * now[0].scale[r][i / 2];
        } else {
          mma_sp<0>(Product(), sum[r][c], a[r][0], b[0], e[r][0]);
          mma_sp<kIn8Bits ? 0 : 1>(Product(), sum[r][c], a[r][1], b[1], e[r][1]);
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

  Scales of_x[kColumnTiles];
#pragma unroll
  for (int c = 0; c < kColumnTiles; ++c) of_x[c] = scales_of<kIn8Bits>(arg, first_row + (column + c) * 8, lane);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first_n = (first_tile + r) * 16 + 8 * half;
      const float bias = bias_of(Out(), arg, first_n + g);
      float scale = 1.0f;
      if constexpr (kIn8Bits)
        if (first_tile + r < arg.row_tiles) scale = load(arg.w_scale + first_n + g);
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
        store_8_by_8(Out(), arg, first_row + (column + c) * 8, first_n, sum[r][c][2 * half] * (scale * of_x[c].low) + bias,
                     sum[r][c][2 * half + 1] * (scale * of_x[c].high) + bias, lane);
    }
}

}  // namespace cast24

#define CAST24_TILED(name, T, Out, column_tiles, row_tiles, warps_m, warps_n, blocks)                           \
  extern "C" __global__ void __launch_bounds__(32 * warps_m * warps_n, blocks)                                  \
      name(const cast24::LinearArguments arg) {                                                                 \
    cast24::tiled_linear<cast24::T, cast24::Out, column_tiles, row_tiles, warps_m, warps_n>(arg);               \
  }
