// AVX-512 (F, BW, DQ, VL) as tile.h takes it: a panel row of 16 lanes is one register. For files compiled for it.
#pragma once

#include <immintrin.h>

#include "tile.h"

namespace cast24 {
namespace {

struct Avx512 {
  using Vec = __m512;
  using Words = __m512i;
  static constexpr int W = 16;
  static constexpr int kTableGroups = 4;
  static constexpr int kSums = 2;
  static constexpr int kTileRows = 8;       // 8 rows x 2 sums, and up to 12 more registers for weights, columns, inputs
  static constexpr int kDenseTileRows = 6;  // 6 rows x 4 outputs of sums

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Vec v) { return _mm512_reduce_add_ps(v); }

  static Vec widen(__m256i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16)); }
  static Vec load_bf16(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load_f32_n(const float* p, int n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
  static Vec load_bf16_n(const uint16_t* p, int n) { return widen(_mm256_maskz_loadu_epi16((1u << n) - 1, p)); }

  static Vec broadcast4(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  static Words words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  // A column becomes an index into all 16 lanes: no broadcast for each group, which would compete with the permutes for
  // the shuffle units.
  static Vec table(const float* p) { return load(p); }
  static Words fields(Words w, int shift) {
    const int first = shift < 4 ? 0x08000800 : 0x0c040c04;  // 4 * (group % 4) for the groups in bytes 3, 2, 1, 0
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(w, shift), _mm512_set1_epi32(0x03030303), _mm512_set1_epi32(first),
                                     0xea);
  }
  static Words field(Words fields, int byte) { return _mm512_srli_epi32(fields, 8 * byte); }
  static Vec pick(Vec table, Words columns) { return _mm512_permutexvar_ps(columns, table); }
  static Vec low(Words w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
  static Vec high(Words w) { return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(-65536))); }
};

}  // namespace
}  // namespace cast24
