// What an instruction set must provide, and which one is in use.
#pragma once

#include <stdint.h>

namespace cast24 {

constexpr int kPanelRows = 16;
constexpr int kTilePanels = 4;                        // most panels that one tile call works on: they share activations
constexpr int kTileWidth = kTilePanels * kPanelRows;  // outputs per tile row
constexpr int kDenseRows = 4;                         // weight rows that one dense call works on

struct Isa {
  const char* name;

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
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

const Isa& isa();

}  // namespace cast24
