// A piece of the output, from its bias to its place in y.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "isa.h"

namespace cast24 {

constexpr int64_t kTileRows = 64;  // most rows of x in a tile: its sums stay in the first-level cache

// Lets f add to a tile [rows, kTileWidth] that holds the bias, and writes its first `width` columns, as far as there are
// outputs, to y[row : row + rows, first : ].
template <class F>
void with_tile(const float* bias, float* y, int64_t row, int64_t rows, int64_t first, int64_t width, int64_t N, const F& f) {
  alignas(64) float tile[kTileRows * kTileWidth];
  const int64_t outputs = std::min(N - first, width);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < width; ++n) tile[m * kTileWidth + n] = bias && n < outputs ? bias[first + n] : 0.0f;
  f(tile);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < outputs; ++n) y[(row + m) * N + first + n] = tile[m * kTileWidth + n];
}

}  // namespace cast24
