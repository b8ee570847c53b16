// Products of 8-bit rounded activations with quantized weights, written once over a vector type. Like tile.h, included by
// one file per instruction set, and free of anything that could be linked into another's path.
//
// A vector type Q has W lanes of 32 bits, one for each weight row, and
//   Ints Sums Floats               4 W bytes (or W words), W int32, W floats
//   kOffset                        what is added to rounded activations: 128 where dot wants them unsigned, else 0
//   kNibble                        how many times too large the weights of `low` and `high` are: 16 or 1
//   load(void*)                    W times 4 bytes
//   low(Ints) high(Ints)           the signed low or high nibble of each byte, as a byte, times kNibble
//   Inputs inputs(uint8_t*)        the 32 inputs of a word
//   columns(Ints words, int block) for block 0..3 of a word: where its four inputs are, as pick wants it
//   pick(Inputs, columns, block)   four inputs for each lane
//   broadcast(uint8_t*)            four bytes in every lane
//   dot(Sums sum, x, w)            sum + the products of the four bytes of each lane
//   zero() add(a, b)               of Sums
//   start(int16_t* sums, int shift) -(sums << shift) as Sums, or zero where kOffset is 0
//   load_floats store_floats to_float mul(a, b) fma(a, b, c) set(float)
//   quantize(float* x, columns, offset, uint8_t* q) -> scale: max |x| becomes 127
#pragma once

#include <stdint.h>

#include "isa.h"
#include "quantized.h"
#include "row_blocks.h"

namespace cast24 {
namespace {

constexpr int64_t kQuantizedBlock = 1024;  // columns that several rows of x share: 10 KB of a panel at most

// Asks for the `Bytes` bytes that lie kPrefetchBytes behind `panel`. Every byte must be asked for once, headers too: one
// line that is waited for costs as much as several words.
template <int Rows, int64_t Bytes>
inline __attribute__((always_inline)) void prefetch(const uint8_t* panel) {
#pragma GCC unroll 9
  for (int64_t line = 0; line < Bytes; line += 64) __builtin_prefetch(panel + kPrefetchBytes<Rows> + line, 0, 2);
}

template <class Q, int Bits, bool Sparse, int Rows>
struct QuantizedTile {
  static constexpr int kVecs = kPanelRows / Q::W;
  static constexpr int kBlocks = Sparse ? 4 : 8;  // of a word, each four weights of a row
  static constexpr int kSums = Rows * kVecs < 4 ? 4 / (Rows * kVecs) : 1;  // of an output, lest a dot wait for the one before
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

  // tile[:Rows, :16] += x W^T over groups begin <= g < end; `panel` points at the first of them.
  static void accumulate(const QuantizedRows& x, int64_t first, const QuantizedLayout& layout, int64_t begin, int64_t end,
                         const uint8_t* panel, float* tile) {
    const int64_t group_words = layout.group / kWordColumns, stride = layout.x_stride;
    const uint8_t* q = x.q + first * stride + begin * layout.group;
    const float* x_scale = x.scale + first * layout.groups;
    int64_t word = begin * group_words;
    for (int64_t g = begin; g < end; ++g) {
      const float* scale = reinterpret_cast<const float*>(panel);
      const int16_t* sum = reinterpret_cast<const int16_t*>(panel + kGroupSums);
      prefetch<Rows, kGroupHeader>(panel);
      panel += kGroupHeader;
      Sums dots[Rows][kVecs][kSums];
      for (int v = 0; v < kVecs; ++v) {
        const Sums start = Q::start(sum + v * Q::W, Bits == 8 ? 7 : 11);
        for (int m = 0; m < Rows; ++m)
          for (int s = 0; s < kSums; ++s) dots[m][v][s] = s == 0 ? start : Q::zero();
      }
      const int64_t next = word + group_words < layout.words ? word + group_words : layout.words;
      for (; word < next; ++word, panel += kWordBytes, q += kWordColumns) {
        prefetch<Rows, kWordBytes>(panel);
        const uint8_t* values = panel + (Sparse ? 64 : 0);
        for (int v = 0; v < kVecs; ++v) {
          if constexpr (Sparse) {
            typename Q::Inputs inputs[Rows];
            for (int m = 0; m < Rows; ++m) inputs[m] = Q::inputs(q + m * stride);
#pragma GCC unroll 4
            for (int b = 0; b < 4; ++b) {
              const Ints columns = Q::columns(Q::load(panel + v * 4 * Q::W), b);
              const Ints w = weights(values, b, v);
              for (int m = 0; m < Rows; ++m)
                dots[m][v][b % kSums] = Q::dot(dots[m][v][b % kSums], Q::pick(inputs[m], columns, b), w);
            }
          } else {
#pragma GCC unroll 8
            for (int b = 0; b < kBlocks; ++b) {
              const Ints w = weights(values, b, v);
              for (int m = 0; m < Rows; ++m)
                dots[m][v][b % kSums] = Q::dot(dots[m][v][b % kSums], Q::broadcast(q + m * stride + 4 * b), w);
            }
          }
        }
      }
      constexpr float kUnit = Bits == 8 ? 1.0f : 1.0f / Q::kNibble;
      for (int v = 0; v < kVecs; ++v) {
        const Floats row_scale = Q::load_floats(scale + v * Q::W);
        for (int m = 0; m < Rows; ++m) {
          Sums dot = dots[m][v][0];
          for (int s = 1; s < kSums; ++s) dot = Q::add(dot, dots[m][v][s]);
          float* const sum = tile + m * kTileWidth + v * Q::W;
          const Floats unit = Q::mul(row_scale, Q::set(x_scale[m * layout.groups + g] * kUnit));
          Q::store_floats(sum, Q::fma(Q::to_float(dot), unit, Q::load_floats(sum)));
        }
      }
    }
  }
};

// tile += x W^T over groups begin <= g < end of a panel, for some rows of x.
template <class Q, int Bits, bool Sparse>
struct QuantizedRowBlocks {
  const QuantizedRows& x;
  int64_t row;
  const QuantizedLayout& layout;
  int64_t begin, end;
  const uint8_t* panel;
  float* tile;

  template <int Rows>
  void rows(int64_t first) const {
    QuantizedTile<Q, Bits, Sparse, Rows>::accumulate(x, row + first, layout, begin, end, panel, tile + first * kTileWidth);
  }
};

// Blocks of groups outside, blocks of rows inside: the weights of a block come to the first-level cache once.
template <class Q, int Bits, bool Sparse>
void quantized_blocks(const QuantizedRows& x, int64_t first, int64_t rows, const QuantizedLayout& layout,
                      const uint8_t* panel, float* tile) {
  const int64_t block = kQuantizedBlock / layout.group;
  const int64_t group_bytes = kGroupHeader + layout.group / kWordColumns * layout.word_bytes;
  for (int64_t begin = 0; begin < layout.groups; begin += block) {
    const int64_t end = begin + block < layout.groups ? begin + block : layout.groups;
    for_row_blocks<Q::kTileRows>(
        rows, QuantizedRowBlocks<Q, Bits, Sparse>{x, first, layout, begin, end, panel + begin * group_bytes, tile});
  }
}

// tile [rows, kTileWidth] += x W^T for one panel.
template <class Q>
void tile_quantized(const QuantizedRows& x, int64_t first, int64_t rows, const QuantizedLayout& layout, const uint8_t* panel,
                    float* tile) {
  if (layout.bits == 8)
    return layout.sparse ? quantized_blocks<Q, 8, true>(x, first, rows, layout, panel, tile)
                         : quantized_blocks<Q, 8, false>(x, first, rows, layout, panel, tile);
  return layout.sparse ? quantized_blocks<Q, 4, true>(x, first, rows, layout, panel, tile)
                       : quantized_blocks<Q, 4, false>(x, first, rows, layout, panel, tile);
}

// Rounds rows of x, group by group, and pads them to whole words.
template <class Q>
void quantize_rows(const float* x, int64_t first, int64_t rows, const QuantizedLayout& layout, const QuantizedRows& rounded) {
  const int64_t K = layout.K;
  for (int64_t m = first; m < first + rows; ++m) {
    uint8_t* q = rounded.q + m * layout.x_stride;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t begin = g * layout.group, left = K - begin;
      rounded.scale[m * layout.groups + g] = Q::quantize(x + m * K + begin, left < layout.group ? left : layout.group,
                                                         Q::kOffset, q + begin);
    }
    for (int64_t k = K; k < layout.words * kWordColumns; ++k) q[k] = Q::kOffset;
  }
}

}  // namespace
}  // namespace cast24
