// One panel of 16 rows from the portable format.
#pragma once

#include <stdint.h>

namespace cast24 {

// Pack rows first_row .. first_row + 15 (zero rows beyond N). Returns as cast24_prepack_f32 does.
// T is float, or uint16_t for bf16.
template <class T>
int64_t pack_panel(const T* values, const uint8_t* bitmask, int64_t N, int64_t K, int64_t first_row, T* panel_values,
                   uint32_t* panel_indices);

}  // namespace cast24
