// What an instruction set must provide, and which one is in use.
#pragma once

#include <stdint.h>

#include "quantized.h"

namespace cast24 {

constexpr int kPanelRows = 16;
constexpr int kTilePanels = 4;                        // most panels that one tile call works on: they share activations
constexpr int kTileWidth = kTilePanels * kPanelRows;  // outputs per tile row
constexpr int kDenseRows = 4;                         // weight rows that one dense call works on

// Sums run over blocks of this many columns: an x block of a few rows and a weight block stay in the second-level cache.
constexpr int64_t kBlockColumns = 2048;

// Rows of x, and most panels, that one call of ColumnKernels works on.
constexpr int64_t kColumnRows = 128;
constexpr int64_t kColumnPanels = 16;

// How far ahead a kernel asks for weights that meet Rows rows of x, into the second-level cache (in the first, lines would
// drive out x). Measured on Zen 4, reading 30 to 58 GB/s: with one or two rows the hardware's prefetcher follows the stream at
// the full rate, and asking far ahead hinders it, by up to a third; with more rows it loses the stream and must be led.
template <int Rows>
constexpr int64_t kPrefetchBytes = Rows <= 2 ? 1536 : 6144;

// What it takes to multiply by quantized weights (see quantized_tile.h).
struct QuantizedKernels {
  // tile [rows, kTileWidth] += x[first : first + rows] W^T for one panel.
  void (*tile)(const QuantizedRows& x, int64_t first, int64_t rows, const QuantizedLayout& layout, const uint8_t* panel,
               float* tile);

  // Round rows first .. first + rows - 1 of x [M, K] as `tile` wants them.
  void (*quantize_rows)(const float* x, int64_t first, int64_t rows, const QuantizedLayout& layout,
                        const QuantizedRows& rounded);
};

// What multiplies 2:4 bf16 weights by inputs rounded to bf16, for CPUs that multiply pairs of bf16.
struct PairKernels {
  // tile [rows, kTileWidth] += x W^T for `panels` adjacent panels; rows of x are padded to whole words of 32 columns.
  void (*tile)(const uint16_t* x, int64_t rows, int64_t K, const uint16_t* values, const uint32_t* indices, int panels,
               float* tile);

  // Round rows of x [rows, K] as `tile` wants them.
  void (*round_rows)(const float* x, int64_t rows, int64_t K, uint16_t* rounded);
};

// What multiplies 2:4 weights by many rows of x that lie column by column, each output's sum in the order of the tiles below.
struct ColumnKernels {
  // columns [K, 16], kColumnRows apart, of x [rows, K], zeros where it has fewer rows than 16.
  void (*to_columns)(const float* x, int64_t rows, int64_t K, float* columns);

  // sums [ceil(K / kBlockColumns), panels * kPanelRows, kColumnRows] of adjacent panels.
  void (*multiply_f32)(const float* columns, int64_t K, const float* values, const uint32_t* indices, int panels,
                       float* sums);
  void (*multiply_bf16)(const float* columns, int64_t K, const uint16_t* values, const uint32_t* indices, int panels,
                        float* sums);

  // tile [rows, kTileWidth] += one block's sums [outputs, kColumnRows], whole panels.
  void (*add_to_tile)(const float* sums, int64_t rows, int64_t outputs, float* tile);
};

struct Isa {
  const char* name;
  const QuantizedKernels* quantized;
  const PairKernels* pairs;      // or nullptr
  const ColumnKernels* columns;  // or nullptr

  // tile [rows, kTileWidth] += x W^T for `panels` adjacent panels; `values` and `indices` point at the first one.
  void (*tile_f32)(const float* x, int64_t rows, int64_t K, const float* values, const uint32_t* indices, int panels,
                   float* tile);
  void (*tile_bf16)(const float* x, int64_t rows, int64_t K, const uint16_t* values, const uint32_t* indices, int panels,
                    float* tile);

  // y[:, :outputs] (row stride N) = x W^T + bias for `outputs` <= kDenseRows adjacent weight rows.
  void (*dense_f32)(const float* x, int64_t M, int64_t K, const float* weight, const float* bias, int outputs, float* y,
                    int64_t N);
  void (*dense_bf16)(const float* x, int64_t M, int64_t K, const uint16_t* weight, const float* bias, int outputs,
                     float* y, int64_t N);
};

extern const Isa kPortable;
extern const QuantizedKernels kQuantizedPortable;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const QuantizedKernels kQuantizedAvx2;
extern const Isa kAvx512;
extern const Isa kAvx512Vnni;
extern const Isa kAvx512Bf16;
extern const Isa kAvx512Wide;
extern const PairKernels kPairsAvx512;
extern const QuantizedKernels kQuantizedVnni;
#elif defined(__aarch64__)
extern const Isa kNeon;
extern const Isa kNeonDot;
#endif

const Isa& isa();

}  // namespace cast24
