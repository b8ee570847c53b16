// What is done around a product (cast24_fusion): to x before, and to a piece of the output on its way from sums to y.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <memory>

#include "cast24.h"
#include "elementwise.h"
#include "isa.h"
#include "parallel.h"

namespace cast24 {

constexpr int64_t kTileRows = 64;  // most rows of x in a tile: its sums stay in the first-level cache

// x as the product takes it: normalized if that is asked for.
class Inputs {
 public:
  Inputs(const float* x, const cast24_fusion* fusion, int64_t M, int64_t K, cast24_parallel_for run, void* pool) : x_(x) {
    if (fusion == nullptr || fusion->norm == nullptr) return;
    normed_.reset(new float[M * K]);
    x_ = normed_.get();
    // As for rounding: a row takes less than a microsecond.
    parallel_for(run, pool, M, M * K / 4, [&](int64_t begin, int64_t end) {
      rms_norm(x + begin * K, fusion->norm, fusion->epsilon, end - begin, K, normed_.get() + begin * K);
    });
  }
  const float* data() const { return x_; }

 private:
  const float* x_;
  std::unique_ptr<float[]> normed_;
};

// Where sums go: N is the number of rows of the weight, and y [M, width()].
struct Output {
  float* y;
  const float* bias;
  const cast24_fusion* fusion;
  int64_t N;

  bool gated() const { return fusion != nullptr && fusion->gated; }
  int64_t width() const { return gated() ? N / 2 : N; }
  // Panels that must be in a tile together.
  int64_t panels() const { return gated() ? 2 : 1; }

  // Lets f add to a tile [rows, kTileWidth] of sums for `width` weight rows from `first` on, and brings them, as far as there
  // are outputs, to y[row : row + rows].
  template <class F>
  void with_tile(int64_t row, int64_t rows, int64_t first, int64_t width, const F& f) const {
    alignas(64) float tile[kTileRows * kTileWidth];
    const int64_t outputs = std::min(N - first, width);
    // By panels, whose size the compiler knows.
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < width; n += kPanelRows) memset(tile + m * kTileWidth + n, 0, kPanelRows * sizeof(float));
    if (bias)
      for (int64_t m = 0; m < rows; ++m) memcpy(tile + m * kTileWidth, bias + first, outputs * sizeof(float));
    f(tile);
    for (int64_t m = 0; m < rows; ++m) {
      float* from = tile + m * kTileWidth;
      if (gated()) {
        // Pairs of whole panels become one each.
        for (int64_t n = 0; n < outputs; n += 2 * kPanelRows) silu_product(from + n, from + n + kPanelRows, from + n / 2);
        store(row + m, first / 2, outputs / 2, from);
      } else {
        store(row + m, first, outputs, from);
      }
    }
  }

 private:
  void store(int64_t m, int64_t first, int64_t outputs, float* from) const {
    const int64_t at = m * width() + first;
    if (fusion != nullptr && fusion->residual != nullptr)
      for (int64_t n = 0; n < outputs; ++n) from[n] += fusion->residual[at + n];
    float* to = y + at;
    int64_t n = 0;
    for (; n + kPanelRows <= outputs; n += kPanelRows) memcpy(to + n, from + n, kPanelRows * sizeof(float));
    for (; n < outputs; ++n) to[n] = from[n];
  }
};

}  // namespace cast24
