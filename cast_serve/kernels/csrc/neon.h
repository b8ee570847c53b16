// NEON, which every 64-bit ARM has: a panel row of 16 lanes is four registers. What multiplies bytes differs, see below.
#pragma once

#include <arm_neon.h>

#include "quantized_tile.h"
#include "tile.h"

namespace cast24 {
namespace {

struct Neon {
  using Vec = float32x4_t;
  using Words = uint32x4_t;
  static constexpr int W = 4;
  static constexpr int kTableGroups = 1;
  static constexpr int kSums = 1;
  static constexpr int kTileRows = 4;
  static constexpr int kDenseTileRows = 4;

  static Vec zero() { return vdupq_n_f32(0.0f); }
  static Vec load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Vec v) { vst1q_f32(p, v); }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  static float sum(Vec v) { return vaddvq_f32(v); }

  static Vec load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
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

  static Vec broadcast4(const float* p) { return load(p); }
  static Vec table(const float* p) { return load(p); }
  static Words words(const uint32_t* p) { return vld1q_u32(p); }
  static Words fields(Words w, int shift) { return vshlq_u32(w, vdupq_n_s32(-shift)); }
  // A column becomes the places of its float's four bytes.
  static Words field(Words fields, int byte) {
    const Words column = vandq_u32(vshlq_u32(fields, vdupq_n_s32(-8 * byte)), vdupq_n_u32(3));
    return vmlaq_u32(vdupq_n_u32(0x03020100), column, vdupq_n_u32(0x04040404));
  }
  static Vec pick(Vec table, Words columns) {
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(table), vreinterpretq_u8_u32(columns)));
  }
  static Vec low(Words w) { return vreinterpretq_f32_u32(vshlq_n_u32(w, 16)); }
  static Vec high(Words w) { return vreinterpretq_f32_u32(vandq_u32(w, vdupq_n_u32(0xffff0000u))); }
};

// Bytes, but for their products: Dot has add(sum, x, w).
template <class Dot>
struct NeonBytes {
  using Ints = int8x16_t;
  using Inputs = int8x16x2_t;
  using Sums = int32x4_t;
  using Floats = float32x4_t;
  static constexpr int W = 4;
  static constexpr int kTileRows = 4;
  static constexpr int kOffset = 0;
  static constexpr int kNibble = 16;

  static Ints load(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
  static Ints low(Ints bytes) { return vshlq_n_s8(bytes, 4); }
  static Ints high(Ints bytes) { return vandq_s8(bytes, vdupq_n_s8(-16)); }
  static Ints columns(Ints words, int block) {
    const uint8x16_t down = vshlq_u8(vreinterpretq_u8_s8(words), vdupq_n_s8(static_cast<int8_t>(-2 * block)));
    const uint8x16_t fields = vandq_u8(down, vdupq_n_u8(3));
    const uint8x16_t first = vreinterpretq_u8_u32(vdupq_n_u32(0x04040000u + 0x08080808u * static_cast<uint32_t>(block)));
    return vreinterpretq_s8_u8(vaddq_u8(fields, first));
  }
  static Inputs inputs(const uint8_t* p) {
    const int8_t* bytes = reinterpret_cast<const int8_t*>(p);
    return {{vld1q_s8(bytes), vld1q_s8(bytes + 16)}};
  }
  static Ints pick(const Inputs& inputs, Ints columns, int) { return vqtbl2q_s8(inputs, vreinterpretq_u8_s8(columns)); }
  static Ints broadcast(const uint8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static Sums dot(Sums sum, Ints x, Ints w) { return Dot::add(sum, x, w); }
  static Sums zero() { return vdupq_n_s32(0); }
  static Sums add(Sums a, Sums b) { return vaddq_s32(a, b); }
  static Sums start(const int16_t*, int) { return zero(); }

  static Floats load_floats(const float* p) { return vld1q_f32(p); }
  static void store_floats(float* p, Floats v) { vst1q_f32(p, v); }
  static Floats set(float value) { return vdupq_n_f32(value); }
  static Floats to_float(Sums v) { return vcvtq_f32_s32(v); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }

  // columns is a multiple of 8, since K is.
  static float quantize(const float* x, int64_t columns, int offset, uint8_t* q) {
    Floats most = vdupq_n_f32(0.0f), poison = most;
    for (int64_t k = 0; k < columns; k += W) {
      const Floats v = vld1q_f32(x + k);
      most = vmaxq_f32(most, vabsq_f32(v));
      poison = vfmaq_f32(poison, v, vdupq_n_f32(0.0f));
    }
    const float largest = vmaxvq_f32(most);
    const Floats inverse = vdupq_n_f32(largest > 0 ? 127.0f / largest : 0.0f);
    for (int64_t k = 0; k < columns; k += 2 * W) {
      const int32x4_t first = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + k), inverse));
      const int32x4_t second = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + k + W), inverse));
      vst1_s8(reinterpret_cast<int8_t*>(q + k), vqmovn_s16(vcombine_s16(vqmovn_s32(first), vqmovn_s32(second))));
    }
    (void)offset;
    return largest / 127.0f + vaddvq_f32(poison);
  }
};

}  // namespace
}  // namespace cast24
