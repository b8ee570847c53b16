// 2:4 bf16 weights by AVX-512 BF16: a row's two kept weights of a group and the two inputs that they meet are one pair
// product. Inputs are rounded to bf16 first, as dense bf16 layers have them; sums are float32.
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa.h"
#include "row_blocks.h"

namespace cast24 {
namespace {

constexpr int kRows = 8;

// The columns of a word's slots, slot 0's in the low half of each lane and slot 1's in the high half: of groups 0 .. 3, then
// of groups 4 .. 7, four bits from one to the next.
struct Halves {
  __m512i of[2];
  explicit Halves(__m512i words) {
    const __mmask32 high = 0xaaaaaaaa;
    of[0] = _mm512_mask_blend_epi16(high, words, _mm512_slli_epi32(words, 14));
    of[1] = _mm512_mask_blend_epi16(high, _mm512_srli_epi32(words, 16), _mm512_srli_epi32(words, 2));
  }

  // Where the inputs of group `group` are among the word's 32.
  __m512i columns(int group) const {
    const __m512i fields = _mm512_srli_epi16(of[group / 4], 4 * (group % 4));
    const int first = 4 * group * 0x00010001;
    return _mm512_ternarylogic_epi32(fields, _mm512_set1_epi16(3), _mm512_set1_epi32(first), 0xea);  // (a & b) | c
  }
};

// sums += groups 0 .. count - 1 of a word.
template <int Rows, int Sums>
inline __attribute__((always_inline)) void add_word(const uint16_t* x, int64_t stride, const uint16_t* w, __m512i words,
                                                    int count, __m512 (&sums)[Rows][Sums]) {
  __m512i inputs[Rows];
  for (int m = 0; m < Rows; ++m) inputs[m] = _mm512_loadu_si512(x + m * stride);
  const Halves halves(words);
#pragma GCC unroll 8
  for (int g = 0; g < count; ++g) {
    const __m512i c = halves.columns(g), weights = _mm512_loadu_si512(w + g * 2 * kPanelRows);
    for (int m = 0; m < Rows; ++m) {
      __m512& sum = sums[m][g % Sums];
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_permutexvar_epi16(c, inputs[m]), (__m512bh)weights);
    }
  }
}

// tile[:Rows, :16] += x W^T over words begin <= word < end of one panel; the last word has `last` groups.
template <int Rows>
void accumulate(const uint16_t* x, int64_t stride, const uint16_t* values, const uint32_t* indices, int64_t begin,
                int64_t end, int last, float* tile) {
  constexpr int kSums = 2;  // of an output, lest a product wait for the one before; the same in every blocking of rows
  __m512 sums[Rows][kSums];
  for (int m = 0; m < Rows; ++m)
    for (int s = 0; s < kSums; ++s) sums[m][s] = _mm512_setzero_ps();
  for (int64_t word = begin; word < end; ++word) {
    const uint16_t* w = values + word * 8 * 2 * kPanelRows;
    const __m512i words = _mm512_loadu_si512(indices + word * kPanelRows);
    if (word + 1 == end && last < 8) {
      add_word<Rows, kSums>(x + word * 32, stride, w, words, last, sums);
      break;
    }
    const char* ahead = reinterpret_cast<const char*>(w) + kPrefetchBytes<Rows>;
#pragma GCC unroll 8
    for (int line = 0; line < 8; ++line) __builtin_prefetch(ahead + 64 * line, 0, 2);
    __builtin_prefetch(indices + (word + kPrefetchBytes<Rows> / 512) * kPanelRows, 0, 2);
    add_word<Rows, kSums>(x + word * 32, stride, w, words, 8, sums);
  }
  for (int m = 0; m < Rows; ++m) {
    __m512 sum = sums[m][0];
    for (int s = 1; s < kSums; ++s) sum = _mm512_add_ps(sum, sums[m][s]);
    _mm512_storeu_ps(tile + m * kTileWidth, _mm512_add_ps(_mm512_loadu_ps(tile + m * kTileWidth), sum));
  }
}

struct AccumulateRows {
  const uint16_t* x;
  int64_t stride;
  const uint16_t* values;
  const uint32_t* indices;
  int64_t begin, end;
  int last;
  float* tile;
  template <int Rows>
  void rows(int64_t first) const {
    accumulate<Rows>(x + first * stride, stride, values, indices, begin, end, last, tile + first * kTileWidth);
  }
};

void tile_pairs(const uint16_t* x, int64_t rows, int64_t K, const uint16_t* values, const uint32_t* indices, int panels,
                float* tile) {
  const int64_t groups = K / 4, words = (groups + 7) / 8, stride = words * 32;
  for (int64_t begin = 0; begin < words; begin += kBlockColumns / 32) {
    const int64_t end = begin + kBlockColumns / 32 < words ? begin + kBlockColumns / 32 : words;
    const int last = end == words ? static_cast<int>(groups - 8 * (words - 1)) : 8;
    for (int p = 0; p < panels; ++p)
      for_row_blocks<kRows>(rows, AccumulateRows{x, stride, values + p * groups * 2 * kPanelRows,
                                                 indices + p * words * kPanelRows, begin, end, last, tile + p * kPanelRows});
  }
}

void round_rows(const float* x, int64_t rows, int64_t K, uint16_t* rounded) {
  const int64_t stride = (K + 31) / 32 * 32;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < stride; k += 16) {
      const int64_t left = K - k;
      const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
      const __m256bh bf16 = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + m * K + k));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + m * stride + k), (__m256i)bf16);
    }
}

}  // namespace

const PairKernels kPairsAvx512 = {tile_pairs, round_rows};

}  // namespace cast24
#endif
