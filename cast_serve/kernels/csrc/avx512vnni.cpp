// Quantized weights by AVX-512 with VNNI (four byte products in one instruction) and VBMI (bytes from a table).
#if defined(__x86_64__)
#include <immintrin.h>

#include "quantized_tile.h"

namespace cast24 {
namespace {

struct Vnni {
  using Ints = __m512i;
  using Inputs = __m512i;
  using Sums = __m512i;
  using Floats = __m512;
  static constexpr int W = 16;
  static constexpr int kTileRows = 8;
  static constexpr int kOffset = 128;
  static constexpr int kNibble = 16;

  static Ints load(const void* p) { return _mm512_loadu_si512(p); }
  static Ints low(Ints bytes) { return _mm512_and_si512(_mm512_slli_epi32(bytes, 4), _mm512_set1_epi8(-16)); }
  static Ints high(Ints bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(-16)); }
  static Ints columns(Ints words, int block) {
    const int first = 0x04040000 + 0x08080808 * block;
    // A shift: bit fields by VBMI would take the units that dots and picks keep busy.
    const Ints fields = _mm512_srli_epi16(words, 2 * block);
    return _mm512_ternarylogic_epi32(fields, _mm512_set1_epi8(3), _mm512_set1_epi32(first), 0xea);  // (a & b) | c
  }
  // All 32 are in one table: no broadcast of 16, which would compete with the picks for the shuffle units.
  static Inputs inputs(const uint8_t* p) {
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Ints pick(Inputs inputs, Ints columns, int) { return _mm512_permutexvar_epi8(columns, inputs); }
  static Ints broadcast(const uint8_t* p) {
    int four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static Sums dot(Sums sum, Ints x, Ints w) { return _mm512_dpbusd_epi32(sum, x, w); }
  static Sums zero() { return _mm512_setzero_si512(); }
  static Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  static Sums start(const int16_t* sums, int shift) {
    const Ints wide = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums)));
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(wide, shift));
  }

  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats set(float value) { return _mm512_set1_ps(value); }
  static Floats to_float(Sums v) { return _mm512_cvtepi32_ps(v); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  static float quantize(const float* x, int64_t columns, int offset, uint8_t* q) {
    // Magnitudes compare as the integers of their bits do, and what is not finite is the largest.
    const Ints magnitude = _mm512_set1_epi32(0x7fffffff);
    Ints most = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + W <= columns; k += W) most = _mm512_max_epi32(most, _mm512_and_si512(load(x + k), magnitude));
    const __mmask16 rest = (1u << (columns - k)) - 1;
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(rest, x + k), magnitude));
    const float largest = _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(most))));
    const Floats inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    const auto rounded = [&](Floats v) {
      return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)), _mm512_set1_epi32(offset)));
    };
    for (k = 0; k + W <= columns; k += W)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), rounded(_mm512_loadu_ps(x + k)));
    if (rest) _mm_mask_storeu_epi8(q + k, rest, rounded(_mm512_maskz_loadu_ps(rest, x + k)));
    return largest / 127.0f + (largest - largest);  // NaN if it is not finite: times zero too
  }
};

}  // namespace

const QuantizedKernels kQuantizedVnni = {tile_quantized<Vnni>, quantize_rows<Vnni>};

}  // namespace cast24
#endif
