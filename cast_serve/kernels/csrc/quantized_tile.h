// Products of 8-bit rounded activations with quantized weights, written once over a vector type. Like tile.h, included by
// one file per instruction set, and free of anything that could be linked into another's path.
//
// A vector type Q has W lanes of 32 bits, one for each weight row, and
//   Ints Sums Floats               4 W bytes (or W words), W int32, W floats
//   kOffset                        what is added to rounded activations: 128 where dot wants them unsigned, else 0
//   kNibble                        how many times too large the weights of `low` and `high` are: 16 or 1
//   load(void*)                    W times 4 bytes
//   low(Ints) high(Ints)           the signed low or high nibble of each byte, as a byte, times kNibble
//   columns(Ints words, int block) for block 0..3 of a word: where its four inputs are in the table of 16 bytes
//   table(uint8_t*)                16 bytes in every 128 bits
//   pick(table, columns)           four bytes for each lane
//   broadcast(uint8_t*)            four bytes in every lane
//   dot(Sums sum, x, w)            sum + the products of the four bytes of each lane
//   start(int16_t* sums, int shift) -(sums << shift) as Sums, or zero where kOffset is 0
//   load_floats store_floats to_float mul(a, b) fma(a, b, c) set(float)
//   quantize(float* x, columns, offset, uint8_t* q) -> scale: max |x| becomes 127
#pragma once

#include <stdint.h>

#include "isa.h"
#include "quantized.h"

namespace cast24 {
namespace {

constexpr int64_t kQuantizedPrefetch = 4096;

template <class Q, int Bits, bool Sparse, int Rows>
struct QuantizedTile {
  static constexpr int kVecs = kPanelRows / Q::W;
  static constexpr int kBlocks = Sparse ? 4 : 8;  // of a word, each four weights of a row
  static constexpr int64_t kWordBytes = (Sparse ? 64 : 0) + kBlocks * 64 * Bits / 8;
  using Ints = typename Q::Ints;
  using Sums = typename Q::Sums;
  using Floats = typename Q::Floats;

  // Weights of block `block`; `values` points at the word's.
  static inline __attribute__((always_inline)) Ints weights(const uint8_t* values, int block, int vec) {
    if constexpr (Bits == 8) return Q::load(values + block * 64 + vec * 4 * Q::W);
    const Ints both = Q::load(values + block / 2 * 64 + vec * 4 * Q::W);
    return block % 2 ? Q::high(both) : Q::low(both);
  }

  // tile[:Rows, :16] += x W^T for one panel.
  static void accumulate(const uint8_t* x, int64_t x_stride, const float* x_scale, int64_t groups, int64_t group_words,
                         int64_t words, const uint8_t* panel, float* tile) {
    Floats sums[Rows][kVecs];
    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < kVecs; ++v) sums[m][v] = Q::load_floats(tile + m * kTileWidth + v * Q::W);
    int64_t word = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const float* scale = reinterpret_cast<const float*>(panel);
      const int16_t* sum = reinterpret_cast<const int16_t*>(panel + kGroupSums);
      panel += kGroupHeader;
      Sums dots[Rows][kVecs];
      for (int v = 0; v < kVecs; ++v) {
        const Sums start = Q::start(sum + v * Q::W, Bits == 8 ? 7 : 11);
        for (int m = 0; m < Rows; ++m) dots[m][v] = start;
      }
      const int64_t end = word + group_words < words ? word + group_words : words;
      for (; word < end; ++word, panel += kWordBytes) {
#pragma GCC unroll 9
        for (int64_t line = 0; line < kWordBytes; line += 64) __builtin_prefetch(panel + kQuantizedPrefetch + line, 0, 2);
        const uint8_t* values = panel + (Sparse ? 64 : 0);
        for (int v = 0; v < kVecs; ++v) {
          if constexpr (Sparse) {
            const Ints index = Q::load(panel + v * 4 * Q::W);
            Ints columns[4], w[4];
#pragma GCC unroll 4
            for (int b = 0; b < 4; ++b) {
              columns[b] = Q::columns(index, b);
              w[b] = weights(values, b, v);
            }
            for (int m = 0; m < Rows; ++m) {
              const uint8_t* inputs = x + m * x_stride + word * kWordColumns;
              const Ints first = Q::table(inputs), second = Q::table(inputs + 16);
#pragma GCC unroll 4
              for (int b = 0; b < 4; ++b)
                dots[m][v] = Q::dot(dots[m][v], Q::pick(b < 2 ? first : second, columns[b]), w[b]);
            }
          } else {
#pragma GCC unroll 8
            for (int b = 0; b < kBlocks; ++b) {
              const Ints w = weights(values, b, v);
              for (int m = 0; m < Rows; ++m)
                dots[m][v] = Q::dot(dots[m][v], Q::broadcast(x + m * x_stride + word * kWordColumns + 4 * b), w);
            }
          }
        }
      }
      constexpr float kUnit = Bits == 8 ? 1.0f : 1.0f / Q::kNibble;
      for (int v = 0; v < kVecs; ++v) {
        const Floats row_scale = Q::load_floats(scale + v * Q::W);
        for (int m = 0; m < Rows; ++m)
          sums[m][v] = Q::fma(Q::to_float(dots[m][v]), Q::mul(row_scale, Q::set(x_scale[m * groups + g] * kUnit)), sums[m][v]);
      }
    }
    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < kVecs; ++v) Q::store_floats(tile + m * kTileWidth + v * Q::W, sums[m][v]);
  }
};

template <class Q, int Bits, bool Sparse, int Rows>
inline void quantized_rows(const QuantizedRows& x, int64_t rows, const QuantizedLayout& layout, const uint8_t* panel,
                           float* tile) {
  const int64_t stride = layout.words * kWordColumns, groups = layout.groups;
  int64_t m = 0;
  for (; m + Rows <= rows; m += Rows)
    QuantizedTile<Q, Bits, Sparse, Rows>::accumulate(x.q + m * stride, stride, x.scale + m * groups, groups,
                                                     layout.group / kWordColumns, layout.words, panel, tile + m * kTileWidth);
  if constexpr (Rows > 1) {
    if (m < rows)
      quantized_rows<Q, Bits, Sparse, Rows / 2>({x.q + m * stride, x.scale + m * groups}, rows - m, layout, panel,
                                                tile + m * kTileWidth);
  }
}

// tile [rows, kTileWidth] += x W^T for one panel.
template <class Q>
void tile_quantized(const QuantizedRows& x, int64_t rows, const QuantizedLayout& layout, const uint8_t* panel, float* tile) {
  constexpr int kRows = Q::kTileRows;
  if (layout.bits == 8) {
    if (layout.sparse) return quantized_rows<Q, 8, true, kRows>(x, rows, layout, panel, tile);
    return quantized_rows<Q, 8, false, kRows>(x, rows, layout, panel, tile);
  }
  if (layout.sparse) return quantized_rows<Q, 4, true, kRows>(x, rows, layout, panel, tile);
  return quantized_rows<Q, 4, false, kRows>(x, rows, layout, panel, tile);
}

// Rounds rows of x, group by group, and pads them to whole words.
template <class Q>
void quantize_rows(const float* x, int64_t rows, const QuantizedLayout& layout, uint8_t* q, float* scale) {
  const int64_t stride = layout.words * kWordColumns, groups = layout.groups;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * layout.group, left = layout.K - begin;
      scale[m * groups + g] = Q::quantize(x + m * layout.K + begin, left < layout.group ? left : layout.group, Q::kOffset,
                                          q + m * stride + begin);
    }
    for (int64_t k = layout.K; k < stride; ++k) q[m * stride + k] = Q::kOffset;
  }
}

}  // namespace
}  // namespace cast24
