// Panels of 16 rows from the portable format.
#pragma once

#include <stdint.h>

namespace cast24 {

// Bits of a nibble with exactly two set, as slot 0's column | slot 1's column << 2; kNoPair for any other nibble.
constexpr uint8_t kNoPair = 0xff;
constexpr uint8_t kColumns[16] = {kNoPair, kNoPair,    kNoPair,    0 | 1 << 2, kNoPair,    0 | 2 << 2, 1 | 2 << 2, kNoPair,
                                  kNoPair, 0 | 3 << 2, 1 | 3 << 2, kNoPair,    2 | 3 << 2, kNoPair,    kNoPair,    kNoPair};
constexpr uint32_t kPadding = 0x44444444;  // columns 0 and 1 in all eight groups of a word

// Pack rows first_row .. first_row + 15 (zero rows beyond N). Returns as cast24_prepack_f32 does.
// T is float, or uint16_t for bf16.
template <class T>
int64_t pack_panel(const T* values, const uint8_t* bitmask, int64_t N, int64_t K, int64_t first_row, T* panel_values,
                   uint32_t* panel_indices);

}  // namespace cast24
