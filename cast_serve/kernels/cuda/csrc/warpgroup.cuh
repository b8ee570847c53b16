// y = x W^T + bias for many rows of x on Hopper: the packed 2:4 weight, in the layout of small_m.cuh, is operand A of
// wgmma.sp, from registers. Only so it reaches the tensor cores' full speed there, and one copy of the weight serves all M.
//
// A block makes kRows rows and 128 columns of y and walks K in turns of 128 bytes of x: one step of the weight, or two where
// x was rounded to 8 bits. Eight warps, two warpgroups, multiply: each loads its own 16 rows of the weight, kAhead turns
// ahead. A thread of a third warpgroup, which leaves its registers to them, fetches x into kStages buffers. What bounds such
// a kernel is the second-level cache, so a cluster of kCluster blocks, which have the same rows of x and other rows of the
// weight, fetches x once: each block its part of it, for all. A buffer is filled again when the warps of all blocks have let
// go of it.
#pragma once

namespace cast24 {

// The structure of the same name in arguments.py.
struct WarpgroupArguments {
  TensorMap x;  // boxes of 128 bytes by kRows / kCluster rows
  LinearArguments linear;
};

// Grid: (a multiple of kCluster, 1, panels x ceil(M / kRows)), a panel being the gridDim.x x 128 rows of the weight that
// blocks which run at the same time share; blocks of 384 threads.
template <class T, class Out, int kRows, int kCluster, int kStages>
__device__ __forceinline__ void warpgroup_linear(const WarpgroupArguments& all) {
  using Product = typename ProductOf<T, Out>::Type;
  constexpr int kWarps = 8, kAhead = 4, kStageBytes = kRows * 128, kPart = kRows / kCluster;
  constexpr bool kIn8Bits = Traits<T>::kXBytes == 1;
  constexpr int kSteps = Traits<T>::kSteps;
  static_assert(kPart % 8 == 0 && kCluster <= 32 && kAhead % 2 == 0);
  const LinearArguments& arg = all.linear;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int along_m = (arg.M + kRows - 1) / kRows, first_row = blockIdx.z % along_m * kRows;
  const int block = blockIdx.z / along_m * gridDim.x + blockIdx.x, tile = block * kWarps + warp;
  const int turns = (arg.steps + kSteps - 1) / kSteps;
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
      for (int turn = 0, slot = 0, round = 0; turn < turns; ++turn) {
        if (round > 0) wait(empty + slot, (round - 1) % 2);
        expect(full + slot, kStageBytes);
        copy_box<kCluster>(x + slot * kStageBytes + part * 128, all.x, turn * (64 * kSteps), first_row + part, full + slot);
        if (++slot == kStages) {
          slot = 0;
          ++round;
        }
      }
    }
  } else {
    grow_to<240>();
    WeightStep<T, 1> weight[kAhead][kSteps];
    const bool in_groups = arg.groups > 1;  // one scale a row waits for the end, where it rounds nothing
    auto fetch = [&](int i, int turn) {
      if (turn >= turns) return;
#pragma unroll
      for (int k = 0; k < kSteps; ++k)  // where the last turn's second step is missing x is zeros
        weight[i][k].template fetch<true>(arg, tile, min(turn * kSteps + k, arg.steps - 1), lane, in_groups);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(i, i);
    let_next_begin();
    wait_for_previous();

    // 16-bit weights go to the products as they are; others are converted while the products before are made.
    constexpr bool kConverts = Traits<T>::kWords < 8;
    uint4 converted[2][2];
    unsigned e_converted[2][2];
    auto convert = [&](int i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if constexpr (kIn8Bits) {
          converted[i % 2][h] = operand_of_step(T(), weight[i][h].words[0]);
          e_converted[i % 2][h] = metadata_of_step(weight[i][h].e[0], lane);
        } else {
          uint4 a = operand_a(Product(), T(), weight[i][0].words[0], h);
          const float(&scale)[2] = weight[i][0].scale[0];
          if (in_groups)
            a = make_uint4(scaled(Out(), a.x, scale[0]), scaled(Out(), a.y, scale[1]), scaled(Out(), a.z, scale[0]),
                           scaled(Out(), a.w, scale[1]));
          converted[i % 2][h] = a;
        }
      }
    };
    auto operand = [&](int i, int h) {
      if constexpr (kConverts)
        return converted[i % 2][h];
      else
        return operand_a(Product(), T(), weight[i][0].words[0], h);
    };
    auto metadata = [&](int i, int h) { return kIn8Bits ? e_converted[i % 2][h] : weight[i][0].e[0]; };
    if constexpr (kConverts) convert(0);

    typename Traits<T>::Sum sum[kRows / 2] = {};
    int slot_before = 0;
    for (int first = 0, slot = 0, round = 0; first < turns; first += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int turn = first + i, i_before = (i + kAhead - 1) % kAhead, i_after = (i + 1) % kAhead;
        if (turn >= turns) break;
        wait(full + slot, round % 2);
        const unsigned char* of_turn = x + slot * kStageBytes;
        begin_products();
        begin_mma_sp<0>(Product(), sum, operand(i, 0), operand_b(of_turn), metadata(i, 0));
        begin_mma_sp<kIn8Bits ? 0 : 1>(Product(), sum, operand(i, 1), operand_b(of_turn + 64), metadata(i, 1));
        end_products();
        wait_for_products<1>();
        if (turn > 0) {  // the turn before is done with its buffer and its registers
          if (lane < kCluster) arrive_at(empty + slot_before, lane);
          fetch(i_before, turn - 1 + kAhead);
        }
        if constexpr (kConverts)
          if (turn + 1 < turns) convert(i_after);
        slot_before = slot;
        if (++slot == kStages) {
          slot = 0;
          ++round;
        }
      }
    }
    wait_for_products<0>();

    float bias[2], scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = tile * 16 + 8 * half + g;
      bias[half] = bias_of(Out(), arg, n);
      scale[half] = 1.0f;
      if constexpr (kConverts)
        if (arg.groups == 1 && tile < arg.row_tiles) scale[half] = load(arg.w_scale + n);
    }
#pragma unroll
    for (int c = 0; c < kRows / 8; ++c) {
      const Scales of_x = scales_of<kIn8Bits>(arg, first_row + c * 8, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = 4 * c + 2 * half;
        store_8_by_8(Out(), arg, first_row + c * 8, tile * 16 + 8 * half, sum[at] * (scale[half] * of_x.low) + bias[half],
                     sum[at + 1] * (scale[half] * of_x.high) + bias[half], lane);
      }
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
