// AVX-512 for CPUs with one shuffle unit of 512 bits for two multiply-adds and two loads of them (Intel's).
//
// Picking inputs by a shuffle for each product makes 2:4 no faster there than dense. So for many rows of x nothing is picked:
// lanes are rows of x, which lies column by column, and the column that a weight keeps is an address.
#if defined(__x86_64__)
#include "avx512.h"

namespace cast24 {
namespace {

struct Avx512Wide : Avx512 {
  static constexpr int kSums = 1;  // as in the other order, where one sum more would be as much again to load and store
  static constexpr int kTileRows = 12;
};

constexpr int kVecs = kColumnRows / 16;
constexpr int64_t kStepWords = 2;  // of 32 columns: x of a step, 32 KB, and a panel's weights lie in the first-level cache

// The two weights of row `n` of a panel in group g, for every lane.
struct Pair {
  __m512 slot[2];
  Pair(const float* values, int64_t g, int n)
      : slot{_mm512_set1_ps(values[g * 2 * kPanelRows + n]), _mm512_set1_ps(values[(g * 2 + 1) * kPanelRows + n])} {}
  Pair(const uint16_t* values, int64_t g, int n) {
    int word;
    __builtin_memcpy(&word, values + (g * kPanelRows + n) * 2, sizeof word);
    const __m512i words = _mm512_set1_epi32(word);
    slot[0] = Avx512::low(words);
    slot[1] = Avx512::high(words);
  }
};

// sums += groups 0 .. count - 1 of a word, in the order of tile.h: even ones first.
template <class T>
inline __attribute__((always_inline)) void add_word(const float* columns, const T* values, int n, uint32_t word, int count,
                                                    __m512 (&sums)[kVecs]) {
  const uint64_t offsets = static_cast<uint64_t>(word) << 9;  // a column of x has 2^9 bytes
  static_assert(kColumnRows * sizeof(float) == 1 << 9, "see above");
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int g = 2 * (i % 4) + i / 4;
    if (g >= count) continue;
    const Pair pair(values, g, n);
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      const char* x = reinterpret_cast<const char*>(columns + g * 4 * kColumnRows) + (offsets >> (4 * g + 2 * s) & 3 << 9);
      asm("" : "+r"(x));  // one register for the address: with two, a multiply-add that loads would be two operations
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v)
        sums[v] = _mm512_fmadd_ps(pair.slot[s], _mm512_loadu_ps(reinterpret_cast<const float*>(x) + 16 * v), sums[v]);
    }
  }
}

template <class T>
void multiply(const float* columns, int64_t K, const T* values, const uint32_t* indices, int panels, float* sums) {
  const int64_t groups = K / 4, words = (groups + 7) / 8, block_words = kBlockColumns / 32;
  for (int64_t first = 0; first < words; first += kStepWords) {
    const int64_t end = first + kStepWords < words ? first + kStepWords : words;
    float* of_block = sums + first / block_words * panels * kPanelRows * kColumnRows;
    for (int p = 0; p < panels; ++p) {
      const T* w = values + p * groups * 2 * kPanelRows;
      const uint32_t* index = indices + p * words * kPanelRows;
      for (int n = 0; n < kPanelRows; ++n) {
        float* to = of_block + (p * kPanelRows + n) * kColumnRows;
        __m512 sum[kVecs];
        for (int v = 0; v < kVecs; ++v)
          sum[v] = first % block_words == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(to + 16 * v);
        for (int64_t word = first; word < end; ++word) {
          const float* x = columns + word * 32 * kColumnRows;
          const T* of_word = w + word * 8 * 2 * kPanelRows;
          const uint32_t fields = index[word * kPanelRows + n];
          if (8 * word + 8 <= groups)
            add_word(x, of_word, n, fields, 8, sum);
          else
            add_word(x, of_word, n, fields, static_cast<int>(groups - 8 * word), sum);
        }
        for (int v = 0; v < kVecs; ++v) _mm512_storeu_ps(to + 16 * v, sum[v]);
      }
    }
  }
}

inline __m512 pairs_low(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
inline __m512 pairs_high(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// A matrix of 16 by 16, transposed: by fours, within 128 bits and then across them.
inline void transpose(__m512 (&rows)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(rows[i], rows[i + 1]), b = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    const __m512 c = _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]), d = _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]);
    t[i] = pairs_low(a, c);
    t[i + 1] = pairs_high(a, c);
    t[i + 2] = pairs_low(b, d);
    t[i + 3] = pairs_high(b, d);
  }
  // t[4 i + j]: columns j, 4 + j, 8 + j and 12 + j of rows 4 i to 4 i + 3, each in 128 bits
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(t[j], t[4 + j], 0x88), b = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(t[j], t[4 + j], 0xdd), d = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    rows[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
    rows[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
    rows[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

void to_columns(const float* x, int64_t rows, int64_t K, float* columns) {
  for (int64_t k = 0; k < K; k += 16) {
    const __mmask16 there = K - k >= 16 ? 0xffff : 0xff;  // K is a multiple of 8
    __m512 piece[16];
    for (int i = 0; i < 16; ++i) piece[i] = i < rows ? _mm512_maskz_loadu_ps(there, x + i * K + k) : _mm512_setzero_ps();
    transpose(piece);
    for (int i = 0; i < 16 && k + i < K; ++i) _mm512_storeu_ps(columns + (k + i) * kColumnRows, piece[i]);
  }
}

void add_to_tile(const float* sums, int64_t rows, int64_t outputs, float* tile) {
  for (int64_t n = 0; n < outputs; n += 16)
    for (int64_t m = 0; m < rows; m += 16) {
      __m512 piece[16];
      for (int i = 0; i < 16; ++i) piece[i] = _mm512_loadu_ps(sums + (n + i) * kColumnRows + m);
      transpose(piece);
      for (int i = 0; i < 16 && m + i < rows; ++i) {
        float* to = tile + (m + i) * kTileWidth + n;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), piece[i]));
      }
    }
}

const ColumnKernels kColumns = {to_columns, multiply<float>, multiply<uint16_t>, add_to_tile};

}  // namespace

const Isa kAvx512Wide = make_isa<Avx512Wide>("avx512wide", &kQuantizedVnni, nullptr, &kColumns);

}  // namespace cast24
#endif
