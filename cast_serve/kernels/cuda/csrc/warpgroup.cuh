// y = x W^T + bias for many rows of x on Hopper: the packed 2:4 weight, in the layout of small_m.cuh, is operand A of
// wgmma.sp, from registers. Only so it reaches the tensor cores' full speed there, and one copy of the weight serves all M.
//
// A block makes kRows rows and 128 columns of y and walks K in steps of 64 columns. Eight warps, two warpgroups, multiply:
// each loads its own 16 rows of the weight, kAhead steps ahead. A thread of a third warpgroup, which leaves its registers to
// them, fetches x into kStages buffers. What bounds such a kernel is the second-level cache, so a cluster of kCluster blocks,
// which have the same rows of x and other rows of the weight, fetches x once: each block its part of it, for all. A buffer is
// filled again when the warps of all blocks have let go of it.
#pragma once

namespace cast24 {

// The structure of the same name in arguments.py.
struct WarpgroupArguments {
  TensorMap x;  // boxes of 64 columns by kRows / kCluster rows
  LinearArguments linear;
};

// Grid: (a multiple of kCluster, 1, panels x ceil(M / kRows)), a panel being the gridDim.x x 128 rows of the weight that
// blocks which run at the same time share; blocks of 384 threads.
template <class T, class Out, int kRows, int kCluster, int kStages>
__device__ __forceinline__ void warpgroup_linear(const WarpgroupArguments& all) {
  using Product = typename ProductOf<T, Out>::Type;
  constexpr int kWarps = 8, kAhead = 4, kStageBytes = kRows * 128, kPart = kRows / kCluster;
  static_assert(Traits<T>::kXBytes == 2 && kPart % 8 == 0 && kCluster <= 32 && kAhead % 2 == 0);
  const LinearArguments& arg = all.linear;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int along_m = (arg.M + kRows - 1) / kRows, first_row = blockIdx.z % along_m * kRows;
  const int block = blockIdx.z / along_m * gridDim.x + blockIdx.x, tile = block * kWarps + warp;
  if (block / kCluster * kCluster * kWarps >= arg.row_tiles) return;  // all of the cluster is past the last tile

  unsigned char* const x = dynamic_shared();
  Barrier* const full = reinterpret_cast<Barrier*>(x + kStages * kStageBytes);
  Barrier* const empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kStages; ++slot) {
      init(full + slot, 1);
      init(empty + slot, kWarps * kCluster);
    }
    publish_barriers();
  }
  meet_cluster();

  if (warp >= kWarps) {
    shrink_to<24>();
    let_next_begin();
    wait_for_previous();
    if (warp == kWarps && lane == 0) {
      const int part = static_cast<int>(rank_in_cluster()) * kPart;
      for (int step = 0, slot = 0, round = 0; step < arg.steps; ++step) {
        if (round > 0) wait(empty + slot, (round - 1) % 2);
        expect(full + slot, kStageBytes);
        copy_box<kCluster>(x + slot * kStageBytes + part * 128, all.x, step * 64, first_row + part, full + slot);
        if (++slot == kStages) {
          slot = 0;
          ++round;
        }
      }
    }
  } else {
    grow_to<240>();
    WeightStep<T, 1> weight[kAhead];
    const bool in_groups = arg.groups > 1;  // one scale a row waits for the end, where it rounds nothing
    auto fetch = [&](int i, int step) {
      if (step < arg.steps) weight[i].template fetch<true>(arg, tile, step, lane, in_groups);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(i, i);
    let_next_begin();
    wait_for_previous();

    // 16-bit weights go to the products as they are; others are made 16-bit floats while the products before are made.
    constexpr bool kConverts = Traits<T>::kGroups;
    uint4 converted[2][2];
    auto convert = [&](int i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint4 a = operand_a(Product(), T(), weight[i].words[0], h);
        const float(&scale)[2] = weight[i].scale[0];
        if (in_groups)
          a = make_uint4(scaled(Out(), a.x, scale[0]), scaled(Out(), a.y, scale[1]), scaled(Out(), a.z, scale[0]),
                         scaled(Out(), a.w, scale[1]));
        converted[i % 2][h] = a;
      }
    };
    auto operand = [&](int i, int h) {
      if constexpr (kConverts)
        return converted[i % 2][h];
      else
        return operand_a(Product(), T(), weight[i].words[0], h);
    };
    if constexpr (kConverts) convert(0);

    float sum[kRows / 2] = {};
    int slot_before = 0;
    for (int first = 0, slot = 0, round = 0; first < arg.steps; first += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int step = first + i, i_before = (i + kAhead - 1) % kAhead, i_after = (i + 1) % kAhead;
        if (step >= arg.steps) break;
        wait(full + slot, round % 2);
        const unsigned char* of_step = x + slot * kStageBytes;
        begin_products();
        begin_mma_sp<0>(Product(), sum, operand(i, 0), operand_b(of_step), weight[i].e[0]);
        begin_mma_sp<1>(Product(), sum, operand(i, 1), operand_b(of_step + 64), weight[i].e[0]);
        end_products();
        wait_for_products<1>();
        if (step > 0) {  // the step before is done with its buffer and its registers
          if (lane < kCluster) arrive_at(empty + slot_before, lane);
          fetch(i_before, step - 1 + kAhead);
        }
        if constexpr (kConverts)
          if (step + 1 < arg.steps) convert(i_after);
        slot_before = slot;
        if (++slot == kStages) {
          slot = 0;
          ++round;
        }
      }
    }
    wait_for_products<0>();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first_n = tile * 16 + 8 * half;
      const float bias = bias_of(Out(), arg, first_n + g);
      float scale = 1.0f;
      if constexpr (Traits<T>::kGroups)
        if (arg.groups == 1 && tile < arg.row_tiles) scale = load(arg.w_scale + first_n + g);
#pragma unroll
      for (int c = 0; c < kRows / 8; ++c)
        store_8_by_8(Out(), arg, first_row + c * 8, first_n, sum[4 * c + 2 * half] * scale + bias,
                     sum[4 * c + 2 * half + 1] * scale + bias, lane);
    }
  }
  meet_cluster();  // nobody leaves while others may still write to its shared memory
}

}  // namespace cast24

#define CAST24_WARPGROUP(name, T, Out, rows, cluster, stages)                          \
  extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(384, 1) \
      name(const __grid_constant__ cast24::WarpgroupArguments arg) {                   \
    cast24::warpgroup_linear<cast24::T, cast24::Out, rows, cluster, stages>(arg);      \
  }
