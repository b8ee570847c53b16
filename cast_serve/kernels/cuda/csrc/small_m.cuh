// y = x W^T + bias for few rows of x: the packed 2:4 weight W is operand A of mma.sp and is streamed from memory once.
//
// A weight tile is 16 rows by 32 columns; a step is 64 columns, two tiles, with one word of metadata per lane. The weight is
// stored in the order of the fragments (layout.py), so that a lane reads its 16 bytes of a tile with one load, and a warp
// 512 contiguous bytes.
//
// A block takes kWarps / kWarpsK x kRowTiles weight tiles downwards and, along K, the steps of its split, which kWarpsK
// warps share in turn. Weights go from memory straight into registers, kDepth steps ahead; x goes through shared memory,
// in the order of operand B. Warps that share K add up their sums through shared memory. Splits of K leave partial sums in
// global memory, and the last block to arrive adds them up in the order of the splits: the result does not depend on who
// was last.
#pragma once

namespace cast24 {

// Arguments of all kernels here; small_m.py has the same structure.
struct LinearArguments {
  const uint4* values;      // [row_tiles, steps, kWords / 4, 32 lanes] of 16 bytes; W4: of 8 bytes
  const unsigned* metadata;  // [row_tiles, steps, 32 lanes]
  const unsigned char* x;   // [M, K], rows x_stride bytes apart, 16-byte aligned, K a multiple of 8
  const float* x_scale;     // [M], E4m3 and S8 only
  const float* w_scale;     // [row_tiles, groups, 16], not for Bf16 and Fp16
  const unsigned short* bias;  // [N] in y's type, or null
  unsigned short* y;        // [M, N]
  uint4* partial;           // for splits > 1: small_m [ceil(M / 8 kColumnTiles), splits, row_tiles, kColumnTiles, 32] of
                            // four sums, tiled [blocks along N, blocks along M, splits, warps, kRowTiles kColumnTiles, 32]
  unsigned* counters;       // for splits > 1: one for each block of a split, all 0
  long long x_stride;
  int M, N, K, row_tiles, steps, steps_per_split;
  int groups, group_steps;  // scales of a row, steps that share one
};

// One tile of x in shared memory: 32 lanes of 16 bytes, and 16 bytes more, so that storing has no bank conflicts.
constexpr int kTileStride = 33;

template <int kColumnTiles>
struct Stage {
  static constexpr int kTiles = 64 / kColumnTiles;  // of x along K: 33 KB in all
  uint4 tiles[kColumnTiles * kTiles * kTileStride];
};

// Bring `tiles` tiles of x, from byte `start` of each row on, into the order of operand B: register i of lane 4 g + t
// holds bytes 16 i + 4 t of row g. Rows that x lacks are left as they are: a column of B is nobody's but its own.
template <int kColumnTiles, int kThreads>
__device__ __forceinline__ void stage_x(Stage<kColumnTiles>& stage, const LinearArguments& arg, int first_row, int start,
                                        int tiles) {
  constexpr int kBatch = 4;  // loads on their way before the first of them is stored
  unsigned* words = reinterpret_cast<unsigned*>(stage.tiles);
  int log_tiles = 0;
  while (1 << log_tiles < tiles) ++log_tiles;
  const int rows = min(8 * kColumnTiles, arg.M - first_row), chunks = rows << (log_tiles + 2);
  for (int first = threadIdx.x; first < chunks; first += kBatch * kThreads) {
    uint4 v[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int c = first + n * kThreads, row = c >> (log_tiles + 2), chunk = c & ((4 << log_tiles) - 1);
      const int byte = start + 16 * chunk;
      const unsigned char* at = arg.x + (first_row + row) * arg.x_stride + byte;
      v[n] = row < rows && byte < 2 * arg.K ? load(reinterpret_cast<const uint4*>(at)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int c = first + n * kThreads, row = c >> (log_tiles + 2), chunk = c & ((4 << log_tiles) - 1);
      if (row >= rows || chunk >= 4 * tiles) continue;
      const int tile = row / 8 * Stage<kColumnTiles>::kTiles + chunk / 4;
      unsigned* at = words + (tile * kTileStride + row % 8 * 4) * 4 + chunk % 4;
      at[0] = v[n].x;
      at[4] = v[n].y;
      at[8] = v[n].z;
      at[12] = v[n].w;
    }
  }
}

__device__ __forceinline__ uint4 bits_of(const float (&s)[4]) {
  return make_uint4(__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]), __float_as_uint(s[3]));
}
__device__ __forceinline__ uint4 bits_of(const int (&s)[4]) {
  return make_uint4(static_cast<unsigned>(s[0]), static_cast<unsigned>(s[1]), static_cast<unsigned>(s[2]),
                    static_cast<unsigned>(s[3]));
}
__device__ __forceinline__ void add_bits(int (&s)[4], const uint4& v) {
  s[0] += static_cast<int>(v.x);
  s[1] += static_cast<int>(v.y);
  s[2] += static_cast<int>(v.z);
  s[3] += static_cast<int>(v.w);
}
__device__ __forceinline__ void add_bits(float (&s)[4], const uint4& v) {
  s[0] += __uint_as_float(v.x);
  s[1] += __uint_as_float(v.y);
  s[2] += __uint_as_float(v.z);
  s[3] += __uint_as_float(v.w);
}

// Grid: (ceil(row_tiles kWarpsK / (kWarps kRowTiles)), splits, ceil(M / (8 kColumnTiles))), blocks of 32 kWarps threads.
template <class T, class Out, int kColumnTiles, int kRowTiles, int kWarps, int kWarpsK, int kDepth>
__device__ __forceinline__ void small_m_linear(const LinearArguments& arg) {
  using Product = typename ProductOf<T, Out>::Type;
  constexpr int kStageSteps = Stage<kColumnTiles>::kTiles / 2;
  static_assert(kStageSteps % (kDepth * kWarpsK) == 0, "a stage is a whole number of rounds of the pipeline");
  __shared__ Stage<kColumnTiles> stage;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int along_k = warp % kWarpsK, first_tile = (blockIdx.x * (kWarps / kWarpsK) + warp / kWarpsK) * kRowTiles;
  const int row_tiles = min(kRowTiles, arg.row_tiles - first_tile);  // of this warp; none if not positive
  const int begin = blockIdx.y * arg.steps_per_split, end = min(begin + arg.steps_per_split, arg.steps);
  const int first_row = blockIdx.z * (8 * kColumnTiles);

  unsigned words[kDepth][kRowTiles][Traits<T>::kWords], e[kDepth][kRowTiles];
  float scale[kDepth][kRowTiles][2];  // of rows g and g + 8
  auto fetch = [&](int slot, int step) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (r < row_tiles && step < end) {
        const long long at = static_cast<long long>(first_tile + r) * arg.steps + step;
        load_step(words[slot][r], arg.values, at, lane);
        e[slot][r] = load_once(arg.metadata + at * 32 + lane);
        if constexpr (Traits<T>::kGroups) {
          const float* of_tile = arg.w_scale + (first_tile + r) * arg.groups * 16 + step / arg.group_steps * 16;
          scale[slot][r][0] = load(of_tile + lane / 4);
          scale[slot][r][1] = load(of_tile + lane / 4 + 8);
        }
      }
    }
  };
#pragma unroll
  for (int slot = 0; slot < kDepth; ++slot) fetch(slot, begin + slot * kWarpsK + along_k);
  // Only the weight may be read before this: it was there long ago.
  let_next_begin();
  wait_for_previous();

  float sum[kRowTiles][kColumnTiles][4] = {};
  for (int round = begin; round < end; round += kDepth * kWarpsK) {
    const int staged = (round - begin) % kStageSteps;
    if (staged == 0) {
      __syncthreads();
      stage_x<kColumnTiles, 32 * kWarps>(stage, arg, first_row, round * 128, min(kStageSteps, end - round) * 2);
      __syncthreads();
    }
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot) {
      const int ahead = slot * kWarpsK + along_k, step = round + ahead;
      if (step < end) {
        uint4 a[kRowTiles][2];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (r < row_tiles) a[r][h] = operand_a(Product(), T(), words[slot][r], h);
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          uint4 b[2];
#pragma unroll
          for (int h = 0; h < 2; ++h)
            b[h] = stage.tiles[(c * Stage<kColumnTiles>::kTiles + (staged + ahead) * 2 + h) * kTileStride + lane];
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            if (r >= row_tiles) continue;
            if constexpr (Traits<T>::kGroups) {
              float of_step[4] = {};
              mma_sp<0>(Product(), of_step, a[r][0], b[0], e[slot][r]);
              mma_sp<1>(Product(), of_step, a[r][1], b[1], e[slot][r]);
#pragma unroll
              for (int i = 0; i < 4; ++i) sum[r][c][i] += of_step[i] * scale[slot][r][i / 2];
            } else {
              mma_sp<0>(Product(), sum[r][c], a[r][0], b[0], e[slot][r]);
              mma_sp<1>(Product(), sum[r][c], a[r][1], b[1], e[slot][r]);
            }
          }
        }
        fetch(slot, step + kDepth * kWarpsK);
      }
    }
  }

  // Sums of the warps that share K: each of them goes on with some of the tiles.
  auto mine = [&](int r, int c) { return r < row_tiles && (r * kColumnTiles + c) % kWarpsK == along_k; };
  if constexpr (kWarpsK > 1) {
    static_assert(kWarps * kRowTiles * kColumnTiles * 32 <= 64 * kTileStride, "sums take the place of the stage");
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
        stage.tiles[((warp * kRowTiles + r) * kColumnTiles + c) * 32 + lane] = bits_of(sum[r][c]);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        if (!mine(r, c)) continue;
        for (int i = 0; i < 4; ++i) sum[r][c][i] = 0;
#pragma unroll
        for (int k = 0; k < kWarpsK; ++k)
          add_bits(sum[r][c], stage.tiles[(((warp - along_k + k) * kRowTiles + r) * kColumnTiles + c) * 32 + lane]);
      }
  }

  // Lane 4 g + t has rows g and g + 8 of the weight tile, columns 2 t and 2 t + 1 of the column tile: rows of x.
  const int g = lane / 4, row = first_row + 2 * (lane % 4), splits = gridDim.y;
  if (splits > 1) {
    auto partial = [&](int split, int r, int c) {
      return arg.partial +
             (((static_cast<long long>(blockIdx.z) * splits + split) * arg.row_tiles + first_tile + r) * kColumnTiles + c) *
                 32 +
             lane;
    };
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
        if (mine(r, c) && row + 8 * c < arg.M) *partial(blockIdx.y, r, c) = bits_of(sum[r][c]);
    unsigned* shared = reinterpret_cast<unsigned*>(stage.tiles);
    if (!last_to_arrive(arg.counters + blockIdx.z * gridDim.x + blockIdx.x, splits, shared)) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
        for (int i = 0; i < 4; ++i) sum[r][c][i] = 0;
#pragma unroll 2
    for (int split = 0; split < splits; ++split)
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c)
          if (mine(r, c) && row + 8 * c < arg.M) add_bits(sum[r][c], load_shared_by_blocks(partial(split, r, c)));
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    if (r >= row_tiles) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = (first_tile + r) * 16 + 8 * half + g;
      if (n >= arg.N) continue;
      const float bias = arg.bias ? to_float(Out(), arg.bias[n]) : 0.0f;
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int m = row + 8 * c + i;
          if (m >= arg.M || !mine(r, c)) continue;
          arg.y[static_cast<long long>(m) * arg.N + n] = from_float(Out(), sum[r][c][2 * half + i] + bias);
        }
    }
  }
}

}  // namespace cast24

#define CAST24_SMALL_M(name, T, Out, column_tiles, row_tiles, warps, warps_k, depth, blocks)                   \
  extern "C" __global__ void __launch_bounds__(32 * warps, blocks) name(const cast24::LinearArguments arg) {   \
    cast24::small_m_linear<cast24::T, cast24::Out, column_tiles, row_tiles, warps, warps_k, depth>(arg);       \
  }
