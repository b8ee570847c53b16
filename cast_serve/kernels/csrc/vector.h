// W-lane vectors in the compiler's own terms, for code that is written once and inlined into one entry point for every
// instruction set, whose functions are marked by `target`.
#pragma once

#include <stdint.h>
#include <string.h>

#define CAST24_INLINE inline __attribute__((always_inline))

namespace cast24 {
namespace {

template <int W>
struct Vec {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));

  static CAST24_INLINE F load(const float* p) {
    F v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static CAST24_INLINE F load(const uint16_t* p) {  // bf16
    uint32_t wide[W];
    for (int i = 0; i < W; ++i) wide[i] = static_cast<uint32_t>(p[i]) << 16;
    F v;
    memcpy(&v, wide, sizeof v);
    return v;
  }
  static CAST24_INLINE void store(float* p, F v) { memcpy(p, &v, sizeof v); }
  static CAST24_INLINE F max(F a, F b) { return a > b ? a : b; }

  // e^x for x <= 0, within 2 ulp; 0 below -87, NaN of NaN. Degree-6 polynomial on [-ln2/2, ln2/2] (Cephes).
  static CAST24_INLINE F exp(F x) {
    const F low = F{} - 87.0f;
    const F clamped = max(x, low);
    const F magic = F{} + 12582912.0f;  // adding it rounds to an integer, left in the low bits
    const F shifted = clamped * 1.44269504f + magic;
    const F n = shifted - magic;
    const F r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    F p = F{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const I power = ((I)shifted - (I)magic + 127) << 23;
    const F result = p * (F)power + (x - x);
    return x < low ? F{} : result;
  }
};

}  // namespace
}  // namespace cast24
