// AVX-512 (F, BW, DQ, VL): a panel row of 16 lanes is one register.
#if defined(__x86_64__)
#include <immintrin.h>

#include "tile.h"

namespace cast24 {
namespace {

struct Avx512 {
  using Vec = __m512;
  using Words = __m512i;
  static constexpr int W = 16;
  static constexpr int kTileRows = 8;       // 8 rows x 2 panels of sums, and 12 more registers for weights and columns
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
  static Words shift(Words w, int n) { return _mm512_srli_epi32(w, n); }
  static Vec pick(Vec four, Words w) { return _mm512_permutevar_ps(four, w); }
  static Vec low(Words w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
  static Vec high(Words w) { return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(-65536))); }
};

}  // namespace

const Isa kAvx512 = make_isa<Avx512>("avx512");

}  // namespace cast24
#endif
