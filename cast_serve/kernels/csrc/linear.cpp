// 2:4 linear: cuts the output into tiles for the threads.
#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "cast24.h"
#include "fusion.h"
#include "isa.h"
#include "panel.h"
#include "parallel.h"

namespace cast24 {
namespace {

// Uninitialized, and a vector never in two cache lines.
template <class T>
std::unique_ptr<T, decltype(&std::free)> cache_aligned(int64_t count) {
  void* memory = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return {static_cast<T*>(memory), &std::free};
}

// Rows of x, and the same rounded to bf16 where the CPU multiplies pairs of bf16 weights by those.
struct Rows {
  const float* x;
  std::unique_ptr<uint16_t[]> rounded;
  int64_t K, stride = (K + 31) / 32 * 32;

  // tile [rows, kTileWidth] += x[row : row + rows] W^T
  void multiply(const Isa& isa, int64_t row, int64_t rows, const float* values, const uint32_t* indices, int panels,
                float* tile) const {
    isa.tile_f32(x + row * K, rows, K, values, indices, panels, tile);
  }
  void multiply(const Isa& isa, int64_t row, int64_t rows, const uint16_t* values, const uint32_t* indices, int panels,
                float* tile) const {
    if (rounded) return isa.pairs->tile(rounded.get() + row * stride, rows, K, values, indices, panels, tile);
    isa.tile_bf16(x + row * K, rows, K, values, indices, panels, tile);
  }
};

template <class T>
Rows rows_of(const Isa& isa, const float* x, int64_t M, int64_t K, cast24_parallel_for run, void* pool) {
  Rows rows{x, nullptr, K};
  if (std::is_same<T, float>::value || isa.pairs == nullptr) return rows;
  rows.rounded.reset(new uint16_t[M * rows.stride]);
  parallel_for(run, pool, M, M * K, [&](int64_t begin, int64_t end) {
    isa.pairs->round_rows(x + begin * K, end - begin, K, rows.rounded.get() + begin * rows.stride);
  });
  return rows;
}

// y[row : row + rows, first : ] from `panels` adjacent panels.
template <class T>
void linear_tile(const Isa& isa, const Rows& x, const T* values, const uint32_t* indices, int panels, const Output& output,
                 int64_t row, int64_t rows, int64_t first) {
  output.with_tile(row, rows, first, panels * kPanelRows,
                   [&](float* tile) { x.multiply(isa, row, rows, values, indices, panels, tile); });
}

void multiply_columns(const ColumnKernels& kernels, const float* columns, int64_t K, const float* values,
                      const uint32_t* indices, int panels, float* sums) {
  kernels.multiply_f32(columns, K, values, indices, panels, sums);
}
void multiply_columns(const ColumnKernels& kernels, const float* columns, int64_t K, const uint16_t* values,
                      const uint32_t* indices, int panels, float* sums) {
  kernels.multiply_bf16(columns, K, values, indices, panels, sums);
}

// Blocks of rows that lie column by column at a time: 16 MB, as what malloc maps anew for each call costs as much as the
// product.
int64_t blocks_at_once(int64_t K) {
  return std::min<int64_t>(std::max<int64_t>((16 << 20) / (static_cast<int64_t>(sizeof(float)) * K * kColumnRows), 1), 8);
}

// Panels that one task works on: many share x from the caches, few keep all threads busy. Even, since gated ones are pairs.
int64_t stack_of(int64_t panels, int64_t blocks) {
  constexpr int64_t kTasks = 64;
  int64_t stack = kColumnPanels;
  while (stack > 2 && (panels + stack - 1) / stack * blocks < kTasks) stack /= 2;
  return stack;
}

// Of M rows of x, how many ColumnKernels take: whole blocks of them, and a last one that is nearly whole.
int64_t rows_by_columns(const Isa& isa, int64_t M) {
  if (isa.columns == nullptr) return 0;
  const int64_t rest = M % kColumnRows;
  return rest >= kColumnRows * 3 / 4 ? M : M - rest;
}

// Rows first to first + M - 1 of y.
template <class T>
void linear_by_columns(const ColumnKernels& kernels, const float* x, const T* values, const uint32_t* indices,
                       const Output& output, int64_t first, int64_t M, int64_t K, cast24_parallel_for run, void* pool) {
  x += first * K;
  const int64_t N = output.N, panels = (N + kPanelRows - 1) / kPanelRows;
  const int64_t panel_values = K / 2 * kPanelRows, panel_indices = (K / 4 + 7) / 8 * kPanelRows;
  const int64_t blocks = (M + kColumnRows - 1) / kColumnRows, stack = stack_of(panels, blocks);
  const int64_t k_blocks = (K + kBlockColumns - 1) / kBlockColumns;
  const auto columns = cache_aligned<float>(blocks * K * kColumnRows);
  parallel_for(run, pool, blocks * kColumnRows / 16, M * K, [&](int64_t begin, int64_t end) {
    for (int64_t m = 16 * begin; m < 16 * end; m += 16)
      kernels.to_columns(x + m * K, std::min<int64_t>(std::max<int64_t>(M - m, 0), 16), K,
                         columns.get() + m / kColumnRows * K * kColumnRows + m % kColumnRows);
  });
  parallel_for(run, pool, (panels + stack - 1) / stack * blocks, M * N * (K / 2), [&](int64_t begin, int64_t end) {
    const auto sums = cache_aligned<float>(k_blocks * stack * kPanelRows * kColumnRows);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t panel = unit / blocks * stack, block = unit % blocks, row = block * kColumnRows;
      const int64_t some = std::min(panels - panel, stack);
      multiply_columns(kernels, columns.get() + block * K * kColumnRows, K, values + panel * panel_values,
                       indices + panel * panel_indices, static_cast<int>(some), sums.get());
      for (int64_t m = 0; m < std::min(M - row, kColumnRows); m += kTileRows)
        for (int64_t p = 0; p < some; p += kTilePanels) {
          const int64_t rows = std::min(M - row - m, kTileRows);
          const int64_t outputs = std::min<int64_t>(some - p, kTilePanels) * kPanelRows;
          output.with_tile(first + row + m, rows, (panel + p) * kPanelRows, outputs, [&](float* tile) {
            for (int64_t k = 0; k < k_blocks; ++k)
              kernels.add_to_tile(sums.get() + ((k * some + p) * kPanelRows) * kColumnRows + m, rows, outputs, tile);
          });
        }
    }
  });
}

template <class T>
void linear(const float* x, const T* values, const uint32_t* indices, const Output& output, int64_t M, int64_t K,
            cast24_parallel_for run, void* pool) {
  const Isa& isa = cast24::isa();
  const int64_t N = output.N, panels = (N + kPanelRows - 1) / kPanelRows;
  const int64_t panel_values = K / 2 * kPanelRows, panel_indices = (K / 4 + 7) / 8 * kPanelRows;
  const Inputs normed(x, output.fusion, M, K, run, pool);
  const int64_t done = rows_by_columns(isa, M);
  const int64_t blocks = (done + kColumnRows - 1) / kColumnRows, most = blocks_at_once(K);
  const int64_t calls = (blocks + most - 1) / most;
  for (int64_t call = 0; call < calls; ++call) {
    const int64_t row = call * blocks / calls * kColumnRows, end = std::min((call + 1) * blocks / calls * kColumnRows, done);
    linear_by_columns(*isa.columns, normed.data(), values, indices, output, row, end - row, K, run, pool);
  }
  if (done == M) return;
  // With few rows of x a panel is read straight through, with many several panels share x from the caches.
  const int64_t tile_panels = M - done > kTileRows ? kTilePanels : output.panels();
  const Rows inputs = rows_of<T>(isa, normed.data(), M, K, run, pool);
  const int64_t tiles = (panels + tile_panels - 1) / tile_panels, chunks = (M - done + kTileRows - 1) / kTileRows;
  parallel_for(run, pool, tiles * chunks, (M - done) * N * (K / 2), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t panel = unit / chunks * tile_panels, row = done + unit % chunks * kTileRows;
      linear_tile(isa, inputs, values + panel * panel_values, indices + panel * panel_indices,
                  static_cast<int>(std::min(panels - panel, tile_panels)), output, row, std::min(M - row, kTileRows),
                  panel * kPanelRows);
    }
  });
}

template <class T>
int64_t linear_bitmask(const float* x, const T* values, const uint8_t* bitmask, const float* bias, float* y, int64_t M,
                       int64_t N, int64_t K, cast24_parallel_for run, void* pool) {
  const Isa& isa = cast24::isa();
  const int64_t panels = (N + kPanelRows - 1) / kPanelRows;
  std::atomic<int64_t> first_bad{INT64_MAX};
  const Rows inputs = rows_of<T>(isa, x, M, K, run, pool);
  const Output output = {y, bias, nullptr, N};
  parallel_for(run, pool, panels, M * N * (K / 2), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> panel_values(new T[K / 2 * kPanelRows]);
    const std::unique_ptr<uint32_t[]> panel_indices(new uint32_t[(K / 4 + 7) / 8 * kPanelRows]);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanelRows;
      const int64_t bad = pack_panel(values, bitmask, N, K, first, panel_values.get(), panel_indices.get());
      if (bad >= 0) {
        int64_t seen = first_bad.load();
        while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
        }
        return;
      }
      for (int64_t row = 0; row < M; row += kTileRows)
        linear_tile(isa, inputs, panel_values.get(), panel_indices.get(), 1, output, row, std::min(M - row, kTileRows),
                    first);
    }
  });
  return first_bad == INT64_MAX ? -1 : first_bad.load();
}

}  // namespace
}  // namespace cast24

void cast24_linear_f32(const float* x, const float* values, const uint32_t* indices, const float* bias,
                       const cast24_fusion* fusion, float* y, int64_t M, int64_t N, int64_t K, cast24_parallel_for run,
                       void* pool) {
  cast24::linear(x, values, indices, {y, bias, fusion, N}, M, K, run, pool);
}

void cast24_linear_bf16(const float* x, const uint16_t* values, const uint32_t* indices, const float* bias,
                       const cast24_fusion* fusion, float* y, int64_t M, int64_t N, int64_t K, cast24_parallel_for run,
                       void* pool) {
  cast24::linear(x, values, indices, {y, bias, fusion, N}, M, K, run, pool);
}

int64_t cast24_linear_bitmask_f32(const float* x, const float* values, const uint8_t* bitmask, const float* bias,
                                  float* y, int64_t M, int64_t N, int64_t K, cast24_parallel_for run, void* pool) {
  return cast24::linear_bitmask(x, values, bitmask, bias, y, M, N, K, run, pool);
}

int64_t cast24_linear_bitmask_bf16(const float* x, const uint16_t* values, const uint8_t* bitmask, const float* bias,
                                   float* y, int64_t M, int64_t N, int64_t K, cast24_parallel_for run, void* pool) {
  return cast24::linear_bitmask(x, values, bitmask, bias, y, M, N, K, run, pool);
}
