// Any CPU: loops over 16 lanes, which the compiler turns into whatever the target's baseline offers.
#include <string.h>

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

}  // namespace

const Isa kPortable = make_isa<Portable>("portable");

}  // namespace cast24
