// A piece of the output, from its bias to its place in y.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "isa.h"

namespace cast24 {

constexpr int64_t kTileRows = 64;  // most rows of x in a tile: its sums stay in the first-level cache

// Lets f add to a tile [rows, kTileWidth] that holds the bias, and writes its first `width` columns, as far as there are
// outputs, to y[row : row + rows, first : ].
template <class F>
void with_tile(const float* bias, float* y, int64_t row, int64_t rows, int64_t first, int64_t width, int64_t N, const F& f) {
  alignas(64) float tile[kTileRows * kTileWidth];
  alignas(64) float start[kTileWidth] = {};
  const int64_t outputs = std::min(N - first, width);
  if (bias) memcpy(start, bias + first, outputs * sizeof(float));
  // By panels, whose size the compiler knows.
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < width; n += kPanelRows) memcpy(tile + m * kTileWidth + n, start + n, kPanelRows * sizeof(float));
  f(tile);
  for (int64_t m = 0; m < rows; ++m) {
    const float* from = tile + m * kTileWidth;
    float* to = y + (row + m) * N + first;
    int64_t n = 0;
    for (; n + kPanelRows <= outputs; n += kPanelRows) memcpy(to + n, from + n, kPanelRows * sizeof(float));
    for (; n < outputs; ++n) to[n] = from[n];
  }
}

}  // namespace cast24
