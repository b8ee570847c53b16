// The inner loops, written once over a vector type. Included by one file per instruction set, each compiled with its own
// flags; everything is in an unnamed namespace, and no standard C++ header is used, so that no function compiled for one
// instruction set can be linked into another's path.
//
// A vector type S (see avx512.h) has W float lanes and
//   zero() load(float*) store(float*, Vec) add(a, b) fma(a, b, c) sum(Vec)
//   load_bf16(uint16_t*)           W words widened
//   load_f32_n / load_bf16_n(p, n) the first n < W elements, zeros behind them
//   broadcast4(float*)             four floats repeated in every 128 bits
//   table(float*)                  the inputs of kTableGroups adjacent groups, each in 128 bits of its own
//   words(uint32_t*)               W index words
//   fields(words, shift)           columns (words >> shift) & 3 of groups 0, 2, 4, 6 (shift 0, 2) or 1, 3, 5, 7 (shift 4, 6),
//                                  one in each byte
//   field(fields, byte)            that byte's columns brought to where pick wants them
//   pick(Vec table, columns)       one input for each lane; a broadcast4 serves as the table of any group
//   low(words) high(words)         the bf16 in the low and high half of each word, as float
// and kSums, the sums that one output has for itself (slot s goes into sum s % kSums), kTileRows and kDenseTileRows, the rows
// of x in one pass.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "row_blocks.h"

namespace cast24 {
namespace {

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

// Asks for one half of the values of groups g .. g + 7, and their index words, kPrefetchBytes of values ahead of their use.
template <int Rows, class T>
inline void prefetch(const T* values, const uint32_t* indices, int64_t g, int half) {
  constexpr int64_t kGroupValues = 2 * kPanelRows, kAhead = kPrefetchBytes<Rows> / (kGroupValues * sizeof(T));
  constexpr int kLines = 8 * kGroupValues * sizeof(T) / 64;
  const char* ahead = reinterpret_cast<const char*>(values + (g + kAhead) * kGroupValues);
  for (int line = half * kLines / 2; line < (half + 1) * kLines / 2; ++line) __builtin_prefetch(ahead + 64 * line, 0, 2);
  if (half == 0) __builtin_prefetch(indices + (g + kAhead) / 8 * kPanelRows, 0, 2);
}

template <class S, class T, int Rows>
struct Tile {
  static constexpr int kVecs = kPanelRows / S::W;
  using Vec = typename S::Vec;
  using Words = typename S::Words;
  using Sums = Vec[Rows][kVecs][S::kSums];

  // sums += one group; field: which byte of `columns`; Whole: x can be read to the end of the group's table.
  template <bool Whole>
  static inline __attribute__((always_inline)) void group(const float* x, int64_t K, const T* values, int64_t g, int in_table,
                                                          const Words (&columns)[2][kVecs], int field, Sums& sums) {
    // The compiler must load each table anew: kept for the next group, tables would push the sums out of registers.
    asm("" : "+r"(x));
    Vec slots[2][kVecs];
    Words column[2][kVecs];
    for (int v = 0; v < kVecs; ++v) {
      load_slots<S>(values, g, v * S::W, slots[0][v], slots[1][v]);
      column[0][v] = S::field(columns[0][v], field);
      column[1][v] = S::field(columns[1][v], field);
    }
    for (int m = 0; m < Rows; ++m) {
      const float* inputs = x + m * K + 4 * g;
      const Vec table = Whole ? S::table(inputs - 4 * in_table) : S::broadcast4(inputs);
      for (int v = 0; v < kVecs; ++v)
        for (int s = 0; s < 2; ++s) {
          Vec& sum = sums[m][v][s % S::kSums];
          sum = S::fma(slots[s][v], S::pick(table, column[s][v]), sum);
        }
    }
  }

  // tile[:Rows, :16] += x W^T over groups begin <= g < end; begin is a multiple of 8.
  static void accumulate(const float* x, int64_t K, const T* values, const uint32_t* indices, int64_t begin, int64_t end,
                         float* tile) {
    Sums sums;
    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < kVecs; ++v)
        for (int s = 0; s < S::kSums; ++s) sums[m][v][s] = S::zero();

    for (int64_t g = begin; g < end; g += 8) {
      // Even groups, then odd ones: masking a word once serves the four of them.
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        Words columns[2][kVecs];
        for (int v = 0; v < kVecs; ++v) {
          const Words words = S::words(indices + g / 8 * kPanelRows + v * S::W);
          columns[0][v] = S::fields(words, 4 * odd);
          columns[1][v] = S::fields(words, 4 * odd + 2);
        }
        if (g + 8 <= end) {
          prefetch<Rows>(values, indices, g, odd);
#pragma GCC unroll 4
          for (int field = 0; field < 4; ++field) {
            const int j = 2 * field + odd;
            group<true>(x, K, values, g + j, j % S::kTableGroups, columns, field, sums);
          }
        } else {
          for (int field = 0; g + 2 * field + odd < end; ++field)
            group<false>(x, K, values, g + 2 * field + odd, 0, columns, field, sums);
        }
      }
    }

    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < kVecs; ++v) {
        Vec sum = sums[m][v][0];
        for (int s = 1; s < S::kSums; ++s) sum = S::add(sum, sums[m][v][s]);
        float* out = tile + m * kTileWidth + v * S::W;
        S::store(out, S::add(S::load(out), sum));
      }
  }
};

template <class S, class T>
struct AccumulateRows {
  const float* x;
  int64_t K;
  const T* values;
  const uint32_t* indices;
  int64_t begin, end;
  float* tile;
  template <int Rows>
  void rows(int64_t first) const {
    Tile<S, T, Rows>::accumulate(x + first * K, K, values, indices, begin, end, tile + first * kTileWidth);
  }
};

// Blocks of columns outside, blocks of rows inside: weights come from memory once, whatever the number of rows, and each
// output's sum has the same order in every row blocking.
template <class S, class T>
void tile(const float* x, int64_t rows, int64_t K, const T* values, const uint32_t* indices, int panels, float* tile) {
  const int64_t groups = K / 4, words = (groups + 7) / 8;
  for (int64_t begin = 0; begin < groups; begin += kBlockGroups) {
    const int64_t end = begin + kBlockGroups < groups ? begin + kBlockGroups : groups;
    for (int p = 0; p < panels; ++p)
      for_row_blocks<S::kTileRows>(rows, AccumulateRows<S, T>{x, K, values + p * groups * 2 * kPanelRows,
                                                             indices + p * words * kPanelRows, begin, end,
                                                             tile + p * kPanelRows});
  }
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
  void rows(int64_t first) const {
    using Vec = typename S::Vec;
    const float* from = x + first * K;
    Vec sum[Rows][Outputs];
    for (int m = 0; m < Rows; ++m)
      for (int n = 0; n < Outputs; ++n) sum[m][n] = S::zero();
    int64_t k = 0;
    for (; k + S::W <= K; k += S::W) {
      Vec w[Outputs];
      for (int n = 0; n < Outputs; ++n) {
        w[n] = load_weight<S>(weight + n * K + k);
        __builtin_prefetch(weight + (n + kDenseRows) * K + k, 0, 2);  // the next call's rows
      }
      for (int m = 0; m < Rows; ++m) {
        const Vec a = S::load(from + m * K + k);
        for (int n = 0; n < Outputs; ++n) sum[m][n] = S::fma(a, w[n], sum[m][n]);
      }
    }
    if (k < K) {
      const int rest = static_cast<int>(K - k);
      for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < Outputs; ++n)
          sum[m][n] = S::fma(S::load_f32_n(from + m * K + k, rest), load_weight_n<S>(weight + n * K + k, rest), sum[m][n]);
    }
    for (int m = 0; m < Rows; ++m)
      for (int n = 0; n < Outputs; ++n) y[(first + m) * N + n] = S::sum(sum[m][n]) + (bias ? bias[n] : 0.0f);
  }
};

template <class S, class T>
void dense(const float* x, int64_t M, int64_t K, const T* weight, const float* bias, int outputs, float* y, int64_t N) {
  if (outputs == kDenseRows)
    return for_row_blocks<S::kDenseTileRows>(M, DenseRows<S, T, kDenseRows>{x, K, weight, bias, y, N});
  for (int n = 0; n < outputs; ++n)
    for_row_blocks<S::kDenseTileRows>(M, DenseRows<S, T, 1>{x, K, weight + n * K, bias ? bias + n : nullptr, y + n, N});
}

template <class S>
constexpr Isa make_isa(const char* name, const QuantizedKernels* quantized, const PairKernels* pairs = nullptr,
                       const ColumnKernels* columns = nullptr) {
  return {name, quantized, pairs, columns, tile<S, float>, tile<S, uint16_t>, dense<S, float>, dense<S, uint16_t>};
}

}  // namespace
}  // namespace cast24
