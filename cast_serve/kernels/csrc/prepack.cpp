// Portable format to panel layout.
#include <stdint.h>
#include <string.h>

#include "cast24.h"
#include "huge_pages.h"
#include "isa.h"
#include "panel.h"

namespace cast24 {
namespace {

inline int64_t slot_offset(float, int64_t group, int row, int slot) { return (group * 2 + slot) * kPanelRows + row; }
inline int64_t slot_offset(uint16_t, int64_t group, int row, int slot) { return (group * kPanelRows + row) * 2 + slot; }

}  // namespace

template <class T>
int64_t pack_panel(const T* values, const uint8_t* bitmask, int64_t N, int64_t K, int64_t first_row, T* panel_values,
                   uint32_t* panel_indices) {
  const int64_t groups = K / 4, words = (groups + 7) / 8;
  memset(panel_values, 0, groups * 2 * kPanelRows * sizeof(T));
  for (int64_t i = 0; i < words * kPanelRows; ++i) panel_indices[i] = kPadding;
  for (int row = 0; row < kPanelRows && first_row + row < N; ++row) {
    const T* source = values + (first_row + row) * (K / 2);
    const uint8_t* mask = bitmask + (first_row + row) * (K / 8);
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t columns = kColumns[mask[g / 2] >> 4 * (g % 2) & 15];
      if (columns == kNoPair) return (first_row + row) * groups + g;
      uint32_t& word = panel_indices[g / 8 * kPanelRows + row];
      word = (word & ~(15u << 4 * (g % 8))) | columns << 4 * (g % 8);
      panel_values[slot_offset(T(), g, row, 0)] = source[2 * g];
      panel_values[slot_offset(T(), g, row, 1)] = source[2 * g + 1];
    }
  }
  return -1;
}

template int64_t pack_panel(const float*, const uint8_t*, int64_t, int64_t, int64_t, float*, uint32_t*);
template int64_t pack_panel(const uint16_t*, const uint8_t*, int64_t, int64_t, int64_t, uint16_t*, uint32_t*);

namespace {

template <class T>
int64_t prepack(const T* values, const uint8_t* bitmask, int64_t N, int64_t K, T* panel_values, uint32_t* panel_indices) {
  const int64_t groups = K / 4, words = (groups + 7) / 8, panels = (N + kPanelRows - 1) / kPanelRows;
  advise_huge_pages(panel_values, panels * groups * 2 * kPanelRows * sizeof(T));
  advise_huge_pages(panel_indices, panels * words * kPanelRows * sizeof(uint32_t));
  for (int64_t row = 0; row < N; row += kPanelRows) {
    const int64_t panel = row / kPanelRows;
    const int64_t bad = pack_panel(values, bitmask, N, K, row, panel_values + panel * groups * 2 * kPanelRows,
                                   panel_indices + panel * words * kPanelRows);
    if (bad >= 0) return bad;
  }
  return -1;
}

}  // namespace
}  // namespace cast24

int64_t cast24_prepack_f32(const float* values, const uint8_t* bitmask, int64_t N, int64_t K, float* panel_values,
                           uint32_t* panel_indices) {
  return cast24::prepack(values, bitmask, N, K, panel_values, panel_indices);
}

int64_t cast24_prepack_bf16(const uint16_t* values, const uint8_t* bitmask, int64_t N, int64_t K, uint16_t* panel_values,
                            uint32_t* panel_indices) {
  return cast24::prepack(values, bitmask, N, K, panel_values, panel_indices);
}
