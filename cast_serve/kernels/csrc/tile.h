// The inner loops, written once over a vector type. Included by one file per instruction set, each compiled with its own
// flags; everything is in an unnamed namespace, and no standard C++ header is used, so that no function compiled for one
// instruction set can be linked into another's path.
//
// A vector type S (see avx512.cpp) has W float lanes and
//   zero() load(float*) store(float*, Vec) fma(a, b, c) sum(Vec)
//   load_bf16(uint16_t*)           W words widened
//   load_f32_n / load_bf16_n(p, n) the first n < W elements, zeros behind them
//   broadcast4(float*)             four floats repeated
//   words(uint32_t*)               W index words; shift(words, n) moves them right by n bits
//   pick(Vec four, words)          lane i becomes four[words[i] & 3]
//   low(words) high(words)         the bf16 in the low and high half of each word, as float
#pragma once

#include <stdint.h>

#include "isa.h"

namespace cast24 {
namespace {

// Sums run over blocks of this many columns: an x block of a few rows and a weight block stay in the nearest caches.
constexpr int64_t kBlockColumns = 512;
constexpr int64_t kBlockGroups = kBlockColumns / 4;

// One group's kept values, slot 0 and slot 1, for W rows of a panel starting at `lane`.
template <class S>
inline void load_slots(const float* values, int64_t group, int lane, typename S::Vec& slot0, typename S::Vec& slot1) {
  slot0 = S::load(values + group * 2 * kPanelRows + lane);
  slot1 = S::load(values + group * 2 * kPanelRows + kPanelRows + lane);
}

template <class S>
inline void load_slots(const uint16_t* values, int64_t group, int lane, typename S::Vec& slot0, typename S::Vec& slot1) {
  const auto words = S::words(reinterpret_cast<const uint32_t*>(values) + group * kPanelRows + lane);
  slot0 = S::low(words);
  slot1 = S::high(words);
}

template <class S, class T, int Panels, int Rows>
struct Tile {
  static constexpr int kVecsPerPanel = kPanelRows / S::W;
  static constexpr int kVecs = Panels * kVecsPerPanel;
  using Vec = typename S::Vec;
  using Words = typename S::Words;

  static inline __attribute__((always_inline)) void group(const float* x, int64_t K, const T* const (&values)[Panels],
                                                          const Words (&columns)[kVecs], int shift, int64_t g,
                                                          Vec (&sum)[Rows][kVecs]) {
    Vec slot0[kVecs], slot1[kVecs];
    Words column0[kVecs], column1[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      load_slots<S>(values[v / kVecsPerPanel], g, v % kVecsPerPanel * S::W, slot0[v], slot1[v]);
      column0[v] = S::shift(columns[v], shift);
      column1[v] = S::shift(columns[v], shift + 2);
    }
    for (int m = 0; m < Rows; ++m) {
      const Vec four = S::broadcast4(x + m * K + 4 * g);
      for (int v = 0; v < kVecs; ++v) {
        sum[m][v] = S::fma(slot0[v], S::pick(four, column0[v]), sum[m][v]);
        sum[m][v] = S::fma(slot1[v], S::pick(four, column1[v]), sum[m][v]);
      }
    }
  }

  // tile[:Rows] += x W^T over groups begin <= g < end; begin is a multiple of 8.
  static void accumulate(const float* x, int64_t K, const T* values, const uint32_t* indices, int64_t begin, int64_t end,
                         float* tile) {
    const int64_t groups = K / 4, words = (groups + 7) / 8;
    const T* panel_values[Panels];
    for (int p = 0; p < Panels; ++p) panel_values[p] = values + p * groups * 2 * kPanelRows;

    Vec sum[Rows][kVecs];
    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < kVecs; ++v) sum[m][v] = S::zero();

    for (int64_t g = begin; g < end; g += 8) {
      Words columns[kVecs];
      for (int v = 0; v < kVecs; ++v)
        columns[v] = S::words(indices + (v / kVecsPerPanel * words + g / 8) * kPanelRows + v % kVecsPerPanel * S::W);
      if (g + 8 <= end) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) group(x, K, panel_values, columns, 4 * j, g + j, sum);
      } else {
        for (int j = 0; g + j < end; ++j) group(x, K, panel_values, columns, 4 * j, g + j, sum);
      }
    }

    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < kVecs; ++v) {
        float* out = tile + m * kTileWidth + v * S::W;
        S::store(out, S::add(S::load(out), sum[m][v]));
      }
  }
};

// Calls f.template operator()<rows>() for a run-time 1 <= rows <= Max.
template <int Max, class F>
inline void with_rows(int rows, F&& f) {
  if constexpr (Max > 1) {
    if (rows < Max) return with_rows<Max - 1>(rows, f);
  }
  f.template operator()<Max>();
}

template <class S, class T, int Panels>
struct AccumulateRows {
  const float* x;
  int64_t K;
  const T* values;
  const uint32_t* indices;
  int64_t begin, end;
  float* tile;
  template <int Rows>
  void operator()() const {
    Tile<S, T, Panels, Rows>::accumulate(x, K, values, indices, begin, end, tile);
  }
};

// Blocks of columns outside, blocks of rows inside: weights come from memory once, whatever the number of rows, and each
// output's sum has the same order in every row blocking.
template <class S, class T, int Panels>
inline void tile_panels(const float* x, int64_t rows, int64_t K, const T* values, const uint32_t* indices, float* tile) {
  const int64_t groups = K / 4;
  const int64_t blocks = (rows + S::kTileRows - 1) / S::kTileRows;
  for (int64_t begin = 0; begin < groups; begin += kBlockGroups) {
    const int64_t end = begin + kBlockGroups < groups ? begin + kBlockGroups : groups;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * rows / blocks, row_end = (b + 1) * rows / blocks;
      with_rows<S::kTileRows>(
          static_cast<int>(row_end - row),
          AccumulateRows<S, T, Panels>{x + row * K, K, values, indices, begin, end, tile + row * kTileWidth});
    }
  }
}

template <class S, class T>
void tile(const float* x, int64_t rows, int64_t K, const T* values, const uint32_t* indices, int panels, float* tile) {
  static_assert(kTilePanels == 2, "one case per number of panels");
  if (panels == 2)
    tile_panels<S, T, 2>(x, rows, K, values, indices, tile);
  else
    tile_panels<S, T, 1>(x, rows, K, values, indices, tile);
}

template <class S>
inline typename S::Vec load_weight(const float* p) {
  return S::load(p);
}
template <class S>
inline typename S::Vec load_weight(const uint16_t* p) {
  return S::load_bf16(p);
}
template <class S>
inline typename S::Vec load_weight_n(const float* p, int n) {
  return S::load_f32_n(p, n);
}
template <class S>
inline typename S::Vec load_weight_n(const uint16_t* p, int n) {
  return S::load_bf16_n(p, n);
}

// Dot products of Rows rows of x with Outputs rows of a dense weight.
template <class S, class T, int Outputs>
struct DenseRows {
  const float* x;
  int64_t K;
  const T* weight;
  const float* bias;
  float* y;
  int64_t N;
  template <int Rows>
  void operator()() const {
    using Vec = typename S::Vec;
    Vec sum[Rows][Outputs];
    for (int m = 0; m < Rows; ++m)
      for (int n = 0; n < Outputs; ++n) sum[m][n] = S::zero();
    int64_t k = 0;
    for (; k + S::W <= K; k += S::W) {
      Vec w[Outputs];
      for (int n = 0; n < Outputs; ++n) w[n] = load_weight<S>(weight + n * K + k);
      for (int m = 0; m < Rows; ++m) {
        const Vec a = S::load(x + m * K + k);
        for (int n = 0; n < Outputs; ++n) sum[m][n] = S::fma(a, w[n], sum[m][n]);
      }
    }
    if (k < K) {
      const int rest = static_cast<int>(K - k);
      for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < Outputs; ++n)
          sum[m][n] = S::fma(S::load_f32_n(x + m * K + k, rest), load_weight_n<S>(weight + n * K + k, rest), sum[m][n]);
    }
    for (int m = 0; m < Rows; ++m)
      for (int n = 0; n < Outputs; ++n) y[m * N + n] = S::sum(sum[m][n]) + (bias ? bias[n] : 0.0f);
  }
};

template <class S, class T, int Outputs>
inline void dense_outputs(const float* x, int64_t M, int64_t K, const T* weight, const float* bias, float* y, int64_t N) {
  const int64_t blocks = (M + S::kDenseTileRows - 1) / S::kDenseTileRows;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = b * M / blocks, row_end = (b + 1) * M / blocks;
    with_rows<S::kDenseTileRows>(static_cast<int>(row_end - row),
                                 DenseRows<S, T, Outputs>{x + row * K, K, weight, bias, y + row * N, N});
  }
}

template <class S, class T>
void dense(const float* x, int64_t M, int64_t K, const T* weight, const float* bias, int outputs, float* y, int64_t N) {
  if (outputs == kDenseRows) return dense_outputs<S, T, kDenseRows>(x, M, K, weight, bias, y, N);
  for (int n = 0; n < outputs; ++n) dense_outputs<S, T, 1>(x, M, K, weight + n * K, bias ? bias + n : nullptr, y + n, N);
}

template <class S>
constexpr Isa make_isa(const char* name) {
  return {name, tile<S, float>, tile<S, uint16_t>, dense<S, float>, dense<S, uint16_t>};
}

}  // namespace
}  // namespace cast24
