// AVX2 and FMA: a panel row of 16 lanes is two registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "quantized_tile.h"
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

// Without VNNI: 16-bit sums of two byte products (|x| <= 127 and |w| <= 127, so they fit), then of four.
struct Avx2Bytes {
  using Ints = __m256i;
  struct Inputs {
    Ints half[2];
  };
  using Sums = __m256i;
  using Floats = __m256;
  static constexpr int W = 8;
  static constexpr int kTileRows = 2;
  static constexpr int kOffset = 0;
  static constexpr int kNibble = 1;

  static Ints load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Ints low(Ints bytes) {
    const Ints values = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1,  //
                                         0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm256_shuffle_epi8(values, _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
  }
  static Ints high(Ints bytes) { return low(_mm256_srli_epi16(bytes, 4)); }
  static Ints columns(Ints words, int block) {
    const Ints fields = _mm256_srli_epi16(words, 2 * block);
    const int first = block % 2 ? 0x0c0c0808 : 0x04040000;
    return _mm256_or_si256(_mm256_and_si256(fields, _mm256_set1_epi8(3)), _mm256_set1_epi32(first));
  }
  static Ints repeat(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Inputs inputs(const uint8_t* p) { return {{repeat(p), repeat(p + 16)}}; }
  static Ints pick(const Inputs& inputs, Ints columns, int block) {
    return _mm256_shuffle_epi8(inputs.half[block / 2], columns);
  }
  static Ints broadcast(const uint8_t* p) {
    int four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
  }
  static Sums dot(Sums sum, Ints x, Ints w) {
    const Ints pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Sums zero() { return _mm256_setzero_si256(); }
  static Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
  static Sums start(const int16_t*, int) { return zero(); }

  static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Floats set(float value) { return _mm256_set1_ps(value); }
  static Floats to_float(Sums v) { return _mm256_cvtepi32_ps(v); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

  // columns is a multiple of 8, since K is.
  static float quantize(const float* x, int64_t columns, int offset, uint8_t* q) {
    Floats most = _mm256_setzero_ps(), poison = most;
    for (int64_t k = 0; k < columns; k += W) {
      const Floats v = _mm256_loadu_ps(x + k);
      most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v));
      poison = _mm256_fmadd_ps(v, _mm256_setzero_ps(), poison);
    }
    float lanes[2][W], largest = 0.0f, rest = 0.0f;
    _mm256_storeu_ps(lanes[0], most);
    _mm256_storeu_ps(lanes[1], poison);
    for (int i = 0; i < W; ++i) {
      largest = lanes[0][i] > largest ? lanes[0][i] : largest;
      rest += lanes[1][i];
    }
    const Floats inverse = _mm256_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    for (int64_t k = 0; k < columns; k += W) {
      const Ints rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), inverse));
      const Ints words = _mm256_packs_epi32(rounded, rounded), bytes = _mm256_packs_epi16(words, words);
      const int parts[2] = {_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4)};
      __builtin_memcpy(q + k, parts, sizeof parts);
    }
    (void)offset;
    return largest / 127.0f + rest;
  }
};

}  // namespace

const QuantizedKernels kQuantizedAvx2 = {tile_quantized<Avx2Bytes>, quantize_rows<Avx2Bytes>};
const Isa kAvx2 = make_isa<Avx2>("avx2", &kQuantizedAvx2);

}  // namespace cast24
#endif
