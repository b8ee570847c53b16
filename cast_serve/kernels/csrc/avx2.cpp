// AVX2 and FMA: a panel row of 16 lanes is two registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "tile.h"

namespace cast24 {
namespace {

struct Avx2 {
  using Vec = __m256;
  using Words = __m256i;
  static constexpr int W = 8;
  static constexpr int kTableGroups = 1;
  static constexpr int kSums = 1;
  static constexpr int kTileRows = 4;
  static constexpr int kDenseTileRows = 2;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Vec v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  static Vec widen(__m128i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16)); }
  static Vec load_bf16(const uint16_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load_f32_n(const float* p, int n) {
    float padded[W] = {};
    for (int i = 0; i < n; ++i) padded[i] = p[i];
    return load(padded);
  }
  static Vec load_bf16_n(const uint16_t* p, int n) {
    uint16_t padded[W] = {};
    for (int i = 0; i < n; ++i) padded[i] = p[i];
    return load_bf16(padded);
  }

  static Vec broadcast4(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
  static Words words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Vec table(const float* p) { return broadcast4(p); }
  static Words fields(Words w, int shift) { return _mm256_srli_epi32(w, shift); }
  static Words field(Words fields, int byte) { return _mm256_srli_epi32(fields, 8 * byte); }
  static Vec pick(Vec table, Words columns) { return _mm256_permutevar_ps(table, columns); }
  static Vec low(Words w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
  static Vec high(Words w) { return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(-65536))); }
};

}  // namespace

const Isa kAvx2 = make_isa<Avx2>("avx2");

}  // namespace cast24
#endif
