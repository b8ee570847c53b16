// Panels of quantized weights: 16 rows, everything that one pass needs in the order in which it is read.
#pragma once

#include <stdint.h>

namespace cast24 {

constexpr int64_t kWordColumns = 32;  // columns of one index word; K is padded to whole words with zero weights
constexpr int64_t kGroupSums = 64;    // a group begins with its rows' scales, f32 [16], and sums, i16 [16]
constexpr int64_t kGroupHeader = 96;

// Where things lie in a panel (cast24.h describes the layout). Plain data: nothing to link into another instruction set.
struct QuantizedLayout {
  int bits;              // 8 or 4
  bool sparse;           // 2:4, else dense
  int64_t K;             // columns
  int64_t group;         // columns that share a scale
  int64_t words;         // of kWordColumns columns
  int64_t groups;        // the last one may be short
  int64_t word_bytes;    // indices if sparse, and values
  int64_t panel_bytes;
  int64_t x_stride;      // bytes from one rounded row of x to the next
};

QuantizedLayout quantized_layout(int bits, bool sparse, int64_t K, int64_t group);

// Rows of x rounded to 8 bits, each group of columns with a scale of its own: x = scale * (q - the kernels' offset).
struct QuantizedRows {
  uint8_t* q;      // [rows, layout.x_stride]
  float* scale;    // [rows, groups]
};

}  // namespace cast24
