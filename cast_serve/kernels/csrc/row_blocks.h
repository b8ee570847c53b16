// Rows of x in blocks whose size the compiler knows.
#pragma once

#include <stdint.h>

namespace cast24 {
namespace {

// One row is asked for first: then there is least to do.
template <int Max, int Rows = 1, class F>
inline void with_rows(int64_t rows, int64_t first, const F& f) {
  if constexpr (Rows < Max) {
    if (rows > Rows) return with_rows<Max, Rows + 1>(rows, first, f);
  }
  f.template rows<Rows>(first);
}

// Calls f.rows<n>(first) on blocks of n <= Max rows from `first` on, which cover 0..rows and differ by one row at most.
template <int Max, class F>
inline void for_row_blocks(int64_t rows, const F& f) {
  const int64_t blocks = (rows + Max - 1) / Max;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * rows / blocks;
    with_rows<Max>((b + 1) * rows / blocks - first, first, f);
  }
}

}  // namespace
}  // namespace cast24
