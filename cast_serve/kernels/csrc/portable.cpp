// Any CPU: loops over 16 lanes, which the compiler turns into whatever the target's baseline offers.
#include <string.h>

#include "quantized_tile.h"
#include "tile.h"

namespace cast24 {
namespace {

struct Portable {
  static constexpr int W = 16;
  struct Vec {
    float lane[W];
  };
  struct Words {
    uint32_t lane[W];
  };
  static constexpr int kTableGroups = 1;
  static constexpr int kSums = 1;
  static constexpr int kTileRows = 1;
  static constexpr int kDenseTileRows = 2;

  static Vec zero() { return {}; }
  static Vec load(const float* p) {
    Vec v;
    memcpy(v.lane, p, sizeof v.lane);
    return v;
  }
  static void store(float* p, const Vec& v) { memcpy(p, v.lane, sizeof v.lane); }
  static Vec add(Vec a, const Vec& b) {
    for (int i = 0; i < W; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Vec fma(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < W; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static float sum(Vec v) {
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) v.lane[i] += v.lane[i + half];
    return v.lane[0];
  }

  static Vec as_float(const Words& w) {
    Vec v;
    memcpy(v.lane, w.lane, sizeof v.lane);
    return v;
  }
  static Vec load_bf16_n(const uint16_t* p, int n) {
    Words w = {};
    for (int i = 0; i < n; ++i) w.lane[i] = static_cast<uint32_t>(p[i]) << 16;
    return as_float(w);
  }
  static Vec load_bf16(const uint16_t* p) { return load_bf16_n(p, W); }
  static Vec load_f32_n(const float* p, int n) {
    Vec v = {};
    memcpy(v.lane, p, n * sizeof(float));
    return v;
  }

  static Vec broadcast4(const float* p) {
    Vec v;
    for (int i = 0; i < W; ++i) v.lane[i] = p[i % 4];
    return v;
  }
  static Words words(const uint32_t* p) {
    Words w;
    memcpy(w.lane, p, sizeof w.lane);
    return w;
  }
  static Vec table(const float* p) { return broadcast4(p); }
  static Words fields(Words w, int shift) {
    for (int i = 0; i < W; ++i) w.lane[i] >>= shift;
    return w;
  }
  static Words field(Words fields, int byte) {
    for (int i = 0; i < W; ++i) fields.lane[i] = fields.lane[i] >> 8 * byte & 3;
    return fields;
  }
  static Vec pick(const Vec& table, const Words& columns) {
    Vec v;
    for (int i = 0; i < W; ++i) v.lane[i] = table.lane[columns.lane[i]];
    return v;
  }
  static Vec low(Words w) {
    for (int i = 0; i < W; ++i) w.lane[i] <<= 16;
    return as_float(w);
  }
  static Vec high(Words w) {
    for (int i = 0; i < W; ++i) w.lane[i] &= 0xffff0000u;
    return as_float(w);
  }
};

struct PortableBytes {
  static constexpr int W = 16;
  struct Ints {
    int8_t byte[W][4];
  };
  using Inputs = const uint8_t*;
  struct Sums {
    int32_t lane[W];
  };
  using Floats = Portable::Vec;
  static constexpr int kTileRows = 1;
  static constexpr int kOffset = 0;
  static constexpr int kNibble = 1;

  static Ints load(const void* p) {
    Ints v;
    memcpy(v.byte, p, sizeof v.byte);
    return v;
  }
  static Ints low(Ints v) {
    for (int i = 0; i < W; ++i)
      for (int b = 0; b < 4; ++b) v.byte[i][b] = static_cast<int8_t>(((v.byte[i][b] & 15) ^ 8) - 8);
    return v;
  }
  static Ints high(Ints v) {
    for (int i = 0; i < W; ++i)
      for (int b = 0; b < 4; ++b) v.byte[i][b] = static_cast<int8_t>(v.byte[i][b] >> 4);
    return v;
  }
  static Ints columns(const Ints& words, int block) {
    Ints v;
    for (int i = 0; i < W; ++i)
      for (int b = 0; b < 4; ++b)
        v.byte[i][b] = static_cast<int8_t>((static_cast<uint8_t>(words.byte[i][b]) >> 2 * block & 3) + b / 2 * 4 + block * 8);
    return v;
  }
  static Inputs inputs(const uint8_t* p) { return p; }
  static Ints pick(Inputs inputs, const Ints& columns, int) {
    Ints v;
    for (int i = 0; i < W; ++i)
      for (int b = 0; b < 4; ++b) v.byte[i][b] = static_cast<int8_t>(inputs[columns.byte[i][b]]);
    return v;
  }
  static Ints broadcast(const uint8_t* p) {
    Ints v;
    for (int i = 0; i < W; ++i) memcpy(v.byte[i], p, 4);
    return v;
  }
  static Sums dot(Sums sum, const Ints& x, const Ints& w) {
    for (int i = 0; i < W; ++i)
      for (int b = 0; b < 4; ++b) sum.lane[i] += x.byte[i][b] * w.byte[i][b];
    return sum;
  }
  static Sums zero() { return {}; }
  static Sums add(Sums a, const Sums& b) {
    for (int i = 0; i < W; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Sums start(const int16_t*, int) { return zero(); }

  static Floats load_floats(const float* p) { return Portable::load(p); }
  static void store_floats(float* p, const Floats& v) { Portable::store(p, v); }
  static Floats set(float value) {
    Floats v;
    for (int i = 0; i < W; ++i) v.lane[i] = value;
    return v;
  }
  static Floats to_float(const Sums& sums) {
    Floats v;
    for (int i = 0; i < W; ++i) v.lane[i] = static_cast<float>(sums.lane[i]);
    return v;
  }
  static Floats mul(Floats a, const Floats& b) {
    for (int i = 0; i < W; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) { return Portable::fma(a, b, c); }

  static float quantize(const float* x, int64_t columns, int offset, uint8_t* q) {
    float largest = 0.0f, poison = 0.0f;
    for (int64_t k = 0; k < columns; ++k) {
      const float magnitude = x[k] < 0 ? -x[k] : x[k];
      largest = magnitude > largest ? magnitude : largest;
      poison += x[k] * 0.0f;
    }
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (int64_t k = 0; k < columns; ++k) {
      // Not within range, and then 0: what is not finite, and all where 127 / largest is not.
      const float scaled = x[k] * inverse;
      const int rounded = scaled >= -127.5f && scaled <= 127.5f ? static_cast<int>(__builtin_rintf(scaled)) : 0;
      q[k] = static_cast<uint8_t>(rounded + offset);
    }
    return largest / 127.0f + poison;
  }
};

}  // namespace

const QuantizedKernels kQuantizedPortable = {tile_quantized<PortableBytes>, quantize_rows<PortableBytes>};
const Isa kPortable = make_isa<Portable>("portable", &kQuantizedPortable);

}  // namespace cast24
