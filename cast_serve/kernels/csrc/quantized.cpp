// Quantized linear layers: packing, products with rounded or with float activations, and reading rows back.
#include "quantized.h"

#include <string.h>

#include <algorithm>
#include <memory>

#include "cast24.h"
#include "fusion.h"
#include "huge_pages.h"
#include "isa.h"
#include "panel.h"
#include "parallel.h"

namespace cast24 {

constexpr int64_t kLine = 64;  // bytes

QuantizedLayout quantized_layout(int bits, bool sparse, int64_t K, int64_t group) {
  QuantizedLayout layout = {bits, sparse, K, group, (K + kWordColumns - 1) / kWordColumns, (K + group - 1) / group, 0, 0, 0};
  layout.word_bytes = sparse ? 64 + 32 * bits : 64 * bits;
  layout.panel_bytes = layout.groups * kGroupHeader + layout.words * layout.word_bytes;
  // An odd number of cache lines: rows at a power of two would share a few sets of the first-level cache, and the weights
  // that pass through would drive them out.
  layout.x_stride = ((layout.words * kWordColumns + kLine - 1) / kLine | 1) * kLine;
  return layout;
}

namespace {

constexpr int64_t kBlockPanels = 8;

struct alignas(kLine) CacheLine {
  uint8_t bytes[kLine];
};

// The words of a panel, group after group.
template <class Byte, class F>
void for_words(const QuantizedLayout& layout, Byte* panel, const F& f) {
  int64_t word = 0;
  for (int64_t g = 0; g < layout.groups; ++g) {
    Byte* header = panel;
    panel += kGroupHeader;
    for (const int64_t end = std::min(word + layout.group / kWordColumns, layout.words); word < end; ++word) {
      f(g, header, word, panel);
      panel += layout.word_bytes;
    }
  }
}

// Byte `four` of row `row` in block `block` of a word's values: each block has four weights of each row.
inline int8_t weight_at(const QuantizedLayout& layout, const uint8_t* values, int block, int row, int four) {
  if (layout.bits == 8) return static_cast<int8_t>(values[block * 64 + row * 4 + four]);
  const uint8_t both = values[block / 2 * 64 + row * 4 + four];
  return static_cast<int8_t>(static_cast<int8_t>(block % 2 ? both : both << 4) >> 4);
}

inline void set_weight(const QuantizedLayout& layout, uint8_t* values, int block, int row, int four, int8_t weight) {
  if (layout.bits == 8)
    values[block * 64 + row * 4 + four] = static_cast<uint8_t>(weight);
  else
    values[block / 2 * 64 + row * 4 + four] |= static_cast<uint8_t>((weight & 15) << block % 2 * 4);
}

// Index bytes of a row where nothing is kept: columns 0 and 1 of every group.
constexpr uint8_t kPlaces[4] = {0x00, 0x55, 0x00, 0x55};

// Index bytes of a row as a word of the float layouts: bits 8 b + 2 i are bits 2 b of byte i.
inline uint32_t index_word(const uint8_t* places) {
  uint32_t word = 0;
  for (int block = 0; block < 4; ++block)
    for (int place = 0; place < 4; ++place) word |= (places[place] >> 2 * block & 3u) << (8 * block + 2 * place);
  return word;
}

// Element i of a row of the portable format: int8, or two int4 in a byte, the first in its low half.
inline int8_t stored(int bits, const uint8_t* row, int64_t i) {
  if (bits == 8) return static_cast<int8_t>(row[i]);
  return static_cast<int8_t>(static_cast<int8_t>(i % 2 ? row[i / 2] : row[i / 2] << 4) >> 4);
}

// Rows first_row .. first_row + 15 (zero rows beyond N). Returns as cast24_prepack_quantized does.
int64_t pack_quantized_panel(const QuantizedLayout& layout, const uint8_t* values, const uint8_t* bitmask,
                             const float* scale, int64_t scale_columns, int64_t N, int64_t first_row, uint8_t* panel) {
  memset(panel, 0, layout.panel_bytes);
  const int64_t K = layout.K, kept = layout.sparse ? K / 2 : K, scales = (K + scale_columns - 1) / scale_columns;
  int64_t bad = -1;
  for_words(layout, panel, [&](int64_t g, uint8_t* header, int64_t word, uint8_t* at) {
    float* row_scale = reinterpret_cast<float*>(header);
    int16_t* sum = reinterpret_cast<int16_t*>(header + kGroupSums);
    for (int row = 0; row < kPanelRows; ++row) {
      if (layout.sparse) memcpy(at + row * 4, kPlaces, sizeof kPlaces);
      if (first_row + row >= N) continue;
      row_scale[row] = scale[(first_row + row) * scales + g * layout.group / scale_columns];
      const uint8_t* source = values + (first_row + row) * (kept * layout.bits / 8);
      uint8_t* target = at + (layout.sparse ? 64 : 0);
      const int blocks = layout.sparse ? 4 : 8, width = layout.sparse ? 8 : 4;
      for (int block = 0; block < blocks && word * kWordColumns + block * width < K; ++block) {
        const int64_t column = word * kWordColumns + block * width;
        if (layout.sparse) {
          const uint8_t mask = bitmask[((first_row + row) * K + column) / 8];
          const uint32_t pairs = (kColumns[mask & 15] | kColumns[mask >> 4] << 4) & 255;
          for (int half = 0; half < 2; ++half)
            if (kColumns[mask >> 4 * half & 15] == kNoPair && bad < 0) bad = ((first_row + row) * K + column) / 4 + half;
          for (int place = 0; place < 4; ++place) {
            uint8_t& index = at[row * 4 + place];
            index = static_cast<uint8_t>((index & ~(3u << 2 * block)) | (pairs >> 2 * place & 3) << 2 * block);
          }
        }
        for (int four = 0; four < 4; ++four) {
          const int8_t weight = stored(layout.bits, source, (layout.sparse ? column / 2 : column) + four);
          set_weight(layout, target, block, row, four, weight);
          sum[row] = static_cast<int16_t>(sum[row] + weight);
        }
      }
    }
  });
  return bad;
}

// y from x rounded to 8 bits.
void linear_rounded(const QuantizedLayout& layout, const float* x, const uint8_t* panels, const Output& output, int64_t M,
                    cast24_parallel_for run, void* pool) {
  const QuantizedKernels& kernels = *isa().quantized;
  const int64_t N = output.N, chunks = (M + kTileRows - 1) / kTileRows;
  const std::unique_ptr<CacheLine[]> q(new CacheLine[M * layout.x_stride / kLine]);
  const std::unique_ptr<float[]> scale(new float[M * layout.groups]);
  const QuantizedRows rounded = {q[0].bytes, scale.get()};
  // A row of 4096 takes half a microsecond: threads are worth waking for many only.
  parallel_for(run, pool, M, M * layout.K / 4, [&](int64_t begin, int64_t end) {
    kernels.quantize_rows(x, begin, end - begin, layout, rounded);
  });
  const int64_t together = output.panels(), count = ((N + kPanelRows - 1) / kPanelRows + together - 1) / together;
  parallel_for(run, pool, count * chunks, M * N * layout.K / 2, [&](int64_t begin, int64_t end) {
    // A few panels and the rows of one chunk stay in the second-level cache together.
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / (kBlockPanels * chunks) * kBlockPanels, units_here = std::min(count - first, kBlockPanels);
      const int64_t in_block = unit - first * chunks, panel = (first + in_block % units_here) * together;
      const int64_t row = in_block / units_here * kTileRows, rows = std::min(M - row, kTileRows);
      output.with_tile(row, rows, panel * kPanelRows, together * kPanelRows, [&](float* tile) {
        for (int64_t p = 0; p < together; ++p)
          kernels.tile(rounded, row, rows, layout, panels + (panel + p) * layout.panel_bytes, tile + p * kPanelRows);
      });
    }
  });
}

// A 2:4 panel as the float kernel takes it.
struct FloatPanel {
  std::unique_ptr<float[]> values;
  std::unique_ptr<uint32_t[]> indices;

  explicit FloatPanel(const QuantizedLayout& layout)
      : values(new float[layout.words * kWordColumns / 2 * kPanelRows]), indices(new uint32_t[layout.words * kPanelRows]) {}

  void fill(const QuantizedLayout& layout, const uint8_t* panel) {
    for_words(layout, panel, [&](int64_t, const uint8_t* header, int64_t word, const uint8_t* at) {
      const float* scale = reinterpret_cast<const float*>(header);
      for (int row = 0; row < kPanelRows; ++row) indices[word * kPanelRows + row] = index_word(at + row * 4);
      float* out = values.get() + word * kWordColumns / 2 * kPanelRows;
      for (int block = 0; block < 4; ++block)
        for (int four = 0; four < 4; ++four, out += kPanelRows)  // a block is two groups of two slots
          for (int row = 0; row < kPanelRows; ++row) out[row] = weight_at(layout, at + 64, block, row, four) * scale[row];
    });
  }
};

// y from x as it is. Panels are made floats in a thread's scratch.
void linear_float_sparse(const QuantizedLayout& layout, const float* x, const uint8_t* panels, const Output& output, int64_t M,
                         cast24_parallel_for run, void* pool) {
  const Isa& isa = cast24::isa();
  const int64_t N = output.N, together = output.panels();
  const int64_t count = ((N + kPanelRows - 1) / kPanelRows + together - 1) / together;
  parallel_for(run, pool, count, M * N * layout.K / 2, [&](int64_t begin, int64_t end) {
    FloatPanel scratch[2] = {FloatPanel(layout), FloatPanel(layout)};
    for (int64_t panel = begin * together; panel < end * together; panel += together) {
      for (int64_t p = 0; p < together; ++p) scratch[p].fill(layout, panels + (panel + p) * layout.panel_bytes);
      for (int64_t row = 0; row < M; row += kTileRows) {
        const int64_t rows = std::min(M - row, kTileRows);
        output.with_tile(row, rows, panel * kPanelRows, together * kPanelRows, [&](float* tile) {
          for (int64_t p = 0; p < together; ++p)
            isa.tile_f32(x + row * layout.K, rows, layout.K, scratch[p].values.get(), scratch[p].indices.get(), 1,
                         tile + p * kPanelRows);
        });
      }
    }
  });
}

// Row `row` of a dense panel, as floats [K].
void read_row(const QuantizedLayout& layout, const uint8_t* panel, int row, float* out) {
  for_words(layout, panel, [&](int64_t, const uint8_t* header, int64_t word, const uint8_t* at) {
    const float scale = reinterpret_cast<const float*>(header)[row];
    for (int64_t k = word * kWordColumns; k < std::min((word + 1) * kWordColumns, layout.K); ++k) {
      const int in_word = static_cast<int>(k % kWordColumns);
      out[k] = weight_at(layout, at, in_word / 4, row, in_word % 4) * scale;
    }
  });
}

void linear_float_dense(const QuantizedLayout& layout, const float* x, const uint8_t* panels, const Output& output, int64_t M,
                        cast24_parallel_for run, void* pool) {
  const Isa& isa = cast24::isa();
  const int64_t N = output.N, together = output.panels(), most = together * kPanelRows;
  parallel_for(run, pool, (N + most - 1) / most, M * N * layout.K, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> weight(new float[most * layout.K]);
    alignas(64) float products[kTileRows * kTileWidth];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * most, outputs = std::min(N - first, most);
      for (int64_t n = 0; n < outputs; ++n)
        read_row(layout, panels + (first + n) / kPanelRows * layout.panel_bytes, static_cast<int>((first + n) % kPanelRows),
                 weight.get() + n * layout.K);
      for (int64_t row = 0; row < M; row += kTileRows) {
        const int64_t rows = std::min(M - row, kTileRows);
        output.with_tile(row, rows, first, most, [&](float* tile) {
          for (int64_t n = 0; n < outputs; n += kDenseRows)
            isa.dense_f32(x + row * layout.K, rows, layout.K, weight.get() + n * layout.K, nullptr,
                          static_cast<int>(std::min<int64_t>(outputs - n, kDenseRows)), products + n, kTileWidth);
          for (int64_t m = 0; m < rows; ++m)
            for (int64_t n = 0; n < outputs; ++n) tile[m * kTileWidth + n] += products[m * kTileWidth + n];
        });
      }
    }
  });
}

}  // namespace
}  // namespace cast24

int64_t cast24_quantized_panel_bytes(int bits, int sparse, int64_t K, int64_t group) {
  return cast24::quantized_layout(bits, sparse != 0, K, group).panel_bytes;
}

int64_t cast24_prepack_quantized(const uint8_t* values, const uint8_t* bitmask, const float* scale, int64_t scale_columns,
                                 int64_t N, int64_t K, int bits, int64_t group, uint8_t* panels) {
  const cast24::QuantizedLayout layout = cast24::quantized_layout(bits, bitmask != nullptr, K, group);
  cast24::advise_huge_pages(panels, (N + cast24::kPanelRows - 1) / cast24::kPanelRows * layout.panel_bytes);
  for (int64_t row = 0; row < N; row += cast24::kPanelRows) {
    const int64_t bad = cast24::pack_quantized_panel(layout, values, bitmask, scale, scale_columns, N, row,
                                                     panels + row / cast24::kPanelRows * layout.panel_bytes);
    if (bad >= 0) return bad;
  }
  return -1;
}

void cast24_linear_quantized(const float* x, const uint8_t* panels, const float* bias, const cast24_fusion* fusion, float* y,
                             int64_t M, int64_t N, int64_t K, int bits, int sparse, int64_t group, int float_activations,
                             cast24_parallel_for run, void* pool) {
  const cast24::QuantizedLayout layout = cast24::quantized_layout(bits, sparse != 0, K, group);
  const cast24::Output output = {y, bias, fusion, N};
  const cast24::Inputs inputs(x, fusion, M, K, run, pool);
  if (!float_activations) return cast24::linear_rounded(layout, inputs.data(), panels, output, M, run, pool);
  if (sparse) return cast24::linear_float_sparse(layout, inputs.data(), panels, output, M, run, pool);
  cast24::linear_float_dense(layout, inputs.data(), panels, output, M, run, pool);
}

void cast24_quantized_rows(const int64_t* rows, int64_t count, const uint8_t* panels, int64_t K, int bits, int64_t group,
                           float* out) {
  const cast24::QuantizedLayout layout = cast24::quantized_layout(bits, false, K, group);
  for (int64_t i = 0; i < count; ++i)
    cast24::read_row(layout, panels + rows[i] / cast24::kPanelRows * layout.panel_bytes,
                     static_cast<int>(rows[i] % cast24::kPanelRows), out + i * K);
}
