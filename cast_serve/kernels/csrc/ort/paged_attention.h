// Causal attention over a paged key-value cache on the CPU: plain C++, no ONNX Runtime.
#pragma once

#include <cstdint>

#include "../cast24.h"

namespace cast24 {

// A cache block holds block_size tokens (a multiple of 16) of all kv heads. Its interior is this file's own choice, made
// so that neither scores nor sums need a horizontal add or a stride:
//   keys    [kv_heads, block_size / 16, head_dim, 16]   16 tokens side by side
//   values  [kv_heads, block_size, head_dim]
constexpr int64_t kKeyTile = 16;
constexpr int64_t kMaxHeadDim = 256;

struct PagedAttentionArgs {
  // Row t of the T new tokens, of all sequences one after another: q + t * q_stride is [heads, head_dim], and so on.
  const float *q, *k, *v;
  int64_t q_stride, kv_stride;
  float* out;  // [T, heads * head_dim]
  void *key_cache, *value_cache;  // float32, or bf16: the upper 16 bits of one, rounded to nearest
  bool bf16_cache;
  int64_t heads, kv_heads, head_dim, block_size;
  const int32_t* block_table;  // [B, max_blocks]
  int64_t max_blocks;
  const int32_t* past_lens;   // [B] tokens already in the cache
  const int32_t* cu_seqlens;  // [B + 1] sequence b owns rows cu_seqlens[b] .. cu_seqlens[b + 1]
  int64_t batch;
  const float *cos, *sin;  // [positions, rotary_dim / 2]; unused where rotary_dim is 0
  int64_t rotary_dim;
  bool interleaved;  // rotate pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2)
  float scale;
  int64_t window;  // keys that a token sees, itself included; -1: all
  float softcap;   // 0: none
};

// Rotates the new tokens' queries and keys, appends keys and values to the cache, and attends over everything cached.
// A row of `out` depends, bit for bit, on its own sequence only: not on the batch, nor on how its tokens were split into
// calls. Everything indexed by the arguments must have been checked.
void paged_attention(const PagedAttentionArgs& args, cast24_parallel_for run, void* pool);

}  // namespace cast24
