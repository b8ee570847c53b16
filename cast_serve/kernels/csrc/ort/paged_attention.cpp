#include "paged_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "../vector.h"

// Bodies are written once over W-lane vectors and inlined into one entry point for every instruction set.
#define INLINE CAST24_INLINE
// Kept out of them: inlined copies of a * b + c * d may be contracted to fused multiply-adds in different ways, and a
// row's bits would then depend on which copy it met.
#define ONE_COPY __attribute__((noinline))

namespace cast24 {
namespace {

using Args = PagedAttentionArgs;

// A row's softmax is taken over segments of the sequence at fixed positions, which are then folded together in order. So a
// long row can be spread over threads, and is summed in the same order whether it is or not.
constexpr int64_t kSegment = 512;
constexpr int64_t kTokensPerItem = 16;  // of one prefill work item; all query heads of one kv head go along
constexpr int64_t kSplitTokens = 4;     // sequences with at most so many new tokens have segments spread over threads
constexpr int64_t kTilesAhead = 4;      // keys fetched into the cache before they are used
constexpr int kRows = 4;                // query rows that share a pass over keys and values

// Running softmax of one query row: out = sum / total, both relative to e^peak.
struct Partial {
  float peak, total;
};

ONE_COPY void rotate(const Args& a, const float* __restrict from, int64_t position, float* __restrict to) {
  const int64_t half = a.rotary_dim / 2;
  const float* __restrict cos = a.cos + position * half;
  const float* __restrict sin = a.sin + position * half;
  for (int64_t i = 0; i < half && a.interleaved; ++i) {
    const float x = from[2 * i], y = from[2 * i + 1];
    to[2 * i] = x * cos[i] - y * sin[i];
    to[2 * i + 1] = y * cos[i] + x * sin[i];
  }
  for (int64_t i = 0; i < half && !a.interleaved; ++i) {
    const float x = from[i], y = from[i + half];
    to[i] = x * cos[i] - y * sin[i];
    to[i + half] = y * cos[i] + x * sin[i];
  }
  for (int64_t i = a.rotary_dim; i < a.head_dim; ++i) to[i] = from[i];
}

// An element of the cache; C is float, or uint16_t for bf16.
INLINE float widened(float x) { return x; }
INLINE float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
INLINE void put(float x, float* to) { *to = x; }
INLINE void put(float x, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);  // to nearest, and a NaN stays one
  *to = static_cast<uint16_t>(bits >> 16);
}

template <class C>
INLINE C* block_of(const Args& a, void* cache, int64_t sequence, int64_t position, int64_t kv_head) {
  const int64_t block = a.block_table[sequence * a.max_blocks + position / a.block_size];
  return static_cast<C*>(cache) + (block * a.kv_heads + kv_head) * a.block_size * a.head_dim;
}

template <class C>
INLINE C* key_tile(const Args& a, int64_t sequence, int64_t position, int64_t kv_head) {
  return block_of<C>(a, a.key_cache, sequence, position, kv_head) +
         position % a.block_size / kKeyTile * kKeyTile * a.head_dim;
}

template <class C>
INLINE C* value_row(const Args& a, int64_t sequence, int64_t position, int64_t kv_head) {
  return block_of<C>(a, a.value_cache, sequence, position, kv_head) + position % a.block_size * a.head_dim;
}

template <class C>
ONE_COPY void append(const Args& a, int64_t sequence, int64_t token, int64_t kv_head) {
  const int64_t position = a.past_lens[sequence] + token - a.cu_seqlens[sequence];
  C* tile = key_tile<C>(a, sequence, position, kv_head) + position % kKeyTile;
  // A key is spread over as many cache lines as it has elements, all of them asked for at once.
  for (int64_t d = 0; d < a.head_dim; ++d) __builtin_prefetch(tile + d * kKeyTile, 1);
  const float* k = a.k + token * a.kv_stride + kv_head * a.head_dim;
  float rotated[kMaxHeadDim];
  if (a.rotary_dim > 0) {
    rotate(a, k, position, rotated);
    k = rotated;
  }
  const float* v = a.v + token * a.kv_stride + kv_head * a.head_dim;
  C* row = value_row<C>(a, sequence, position, kv_head);
  for (int64_t d = 0; d < a.head_dim; ++d) put(k[d], tile + d * kKeyTile);
  for (int64_t d = 0; d < a.head_dim; ++d) put(v[d], row + d);
}

// First key that a query at `position` sees.
INLINE int64_t first_key(const Args& a, int64_t position) {
  return a.window < 0 ? 0 : std::max<int64_t>(0, position - a.window + 1);
}

// R query rows (already rotated and scaled; positions ascending) against keys from..to of one segment:
// scores, their softmax relative to the row's peak, and the weighted sum of the values.
template <int W, class C, int R>
INLINE void attend_rows(const Args& a, int64_t sequence, int64_t kv_head, const float (*q)[kMaxHeadDim], const int64_t* positions,
                        int64_t segment_begin, int64_t segment_end, Partial* partial, float* const* sums) {
  using V = Vec<W>;
  using F = typename V::F;
  using I = typename V::I;
  constexpr int kTileVecs = kKeyTile / W;
  const int64_t D = a.head_dim;
  const int64_t begin = std::max(segment_begin, first_key(a, positions[0]));
  const int64_t end = std::min(segment_end, positions[R - 1] + 1);
  const int64_t first_tile = begin / kKeyTile * kKeyTile;
  alignas(64) float scores[R][kSegment];

  I lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  const F none = F{} - INFINITY;
  F peaks[R];
  for (int r = 0; r < R; ++r) peaks[r] = none;
  for (int64_t tile = first_tile; tile < end; tile += kKeyTile) {
    const C* keys = key_tile<C>(a, sequence, tile, kv_head);
    // Blocks and pages are short, so the hardware foresees too little of what comes. A tile of keys, as one of values, is
    // D cache lines of floats, or half as many of bf16.
    const int64_t ahead = tile + kTilesAhead * kKeyTile;
    const C* next_keys = key_tile<C>(a, sequence, ahead < end ? ahead : tile, kv_head);
    const C* values = value_row<C>(a, sequence, tile, kv_head);
    F sum[R][kTileVecs] = {};
    for (int64_t d = 0; d < D; ++d) {
      __builtin_prefetch(next_keys + d * kKeyTile, 0, 2);
      __builtin_prefetch(values + d * kKeyTile, 0, 2);
#pragma GCC unroll 4
      for (int c = 0; c < kTileVecs; ++c) {
        const F key = V::load(keys + d * kKeyTile + c * W);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][c] += q[r][d] * key;
      }
    }
    for (int r = 0; r < R; ++r) {
      const int32_t from = static_cast<int32_t>(first_key(a, positions[r]) - tile);
      const int32_t to = static_cast<int32_t>(std::min(positions[r] + 1, segment_end) - tile);
      for (int c = 0; c < kTileVecs; ++c) {
        F s = sum[r][c];
        if (a.softcap > 0) {
          for (int i = 0; i < W; ++i) s[i] = a.softcap * std::tanh(s[i] / a.softcap);
        }
        if (from > 0 || to < kKeyTile) {
          const I lane = lanes + c * W;
          s = ((lane >= from) & (lane < to)) ? s : none;
        }
        V::store(&scores[r][tile - segment_begin + c * W], s);
        peaks[r] = V::max(s, peaks[r]);
      }
    }
  }

  const int64_t tile_end = (end + kKeyTile - 1) / kKeyTile * kKeyTile;
  for (int r = 0; r < R; ++r) {
    float peak = -INFINITY;
    for (int i = 0; i < W; ++i) peak = std::max(peak, peaks[r][i]);
    if (first_key(a, positions[r]) >= end || positions[r] < begin) {  // the row sees nothing of this segment
      partial[r] = {-INFINITY, 0.0f};
      std::fill(&scores[r][first_tile - segment_begin], &scores[r][tile_end - segment_begin], 0.0f);
      continue;
    }
    if (peak == -INFINITY) peak = 0.0f;  // scores that are no numbers have no peak, and must stay what they are
    partial[r] = {peak, 0.0f};
    F total[kTileVecs] = {};
    for (int64_t tile = first_tile - segment_begin; tile < tile_end - segment_begin; tile += kKeyTile) {
      for (int c = 0; c < kTileVecs; ++c) {
        const F p = V::exp(V::load(&scores[r][tile + c * W]) - peak);
        V::store(&scores[r][tile + c * W], p);
        total[c] += p;
      }
    }
    for (int c = 0; c < kTileVecs; ++c) {
      for (int i = 0; i < W; ++i) partial[r].total += total[c][i];
    }
  }

  // Whole vectors of head_dim, as many at a time as registers allow, then single elements.
  constexpr int kVecs = W == 16 ? 4 : W == 8 ? 2 : 1;
  int64_t d = 0;
  for (; d + kVecs * W <= D; d += kVecs * W) {
    F sum[R][kVecs] = {};
    for (int64_t j = begin; j < end;) {
      const C* values = value_row<C>(a, sequence, j, kv_head) + d;
      const int64_t stop = std::min(end, (j / a.block_size + 1) * a.block_size);
      for (; j < stop; ++j, values += D) {
#pragma GCC unroll 4  // or sums would go through memory
        for (int c = 0; c < kVecs; ++c) {
          const F value = V::load(values + c * W);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[r][c] += scores[r][j - segment_begin] * value;
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < kVecs; ++c) V::store(sums[r] + d + c * W, sum[r][c]);
    }
  }
  for (; d < D; ++d) {
    float sum[R] = {};
    for (int64_t j = begin; j < end; ++j) {
      const float value = widened(value_row<C>(a, sequence, j, kv_head)[d]);
      for (int r = 0; r < R; ++r) sum[r] += scores[r][j - segment_begin] * value;
    }
    for (int r = 0; r < R; ++r) sums[r][d] = sum[r];
  }
}

// Adds a later segment's partial softmax to `into`.
ONE_COPY void fold(Partial& into, float* sum, const Partial& other, const float* other_sum, int64_t D) {
  if (other.peak == -INFINITY) return;
  const float peak = std::max(into.peak, other.peak);
  const float keep = std::exp(into.peak - peak), add = std::exp(other.peak - peak);
  for (int64_t d = 0; d < D; ++d) sum[d] = sum[d] * keep + other_sum[d] * add;
  into = {peak, into.total * keep + other.total * add};
}

// Some tokens of one sequence with all query heads of one kv head. `slot` is where the partial result of a split
// sequence's segment goes (segment >= 0); an unsplit item goes through all its segments and writes `out` itself. An item
// that has all new tokens of its sequence appends their keys and values, which are then at hand.
struct Item {
  int64_t sequence, token_begin, token_end, kv_head, segment, slot;
  bool appends;
};

struct Plan {
  const Args& args;
  std::vector<std::pair<int64_t, int64_t>> appended_before;  // sequence and token, where several items read what is new
  std::vector<Item> items;
  std::vector<Partial> partials;  // [slots]
  std::vector<float> sums;        // [slots, head_dim]
};

template <int W, class C, int R>
INLINE void run_rows(const Plan& plan, const Item& item, int64_t row, Partial* split_partials, float* split_sums) {
  const Args& a = plan.args;
  const int64_t D = a.head_dim, group = a.heads / a.kv_heads;
  alignas(64) float q_rows[R][kMaxHeadDim];
  alignas(64) float segment_sums[R][kMaxHeadDim];
  alignas(64) float running_sums[R][kMaxHeadDim];
  float* sums[R];
  float* out[R];
  int64_t positions[R];
  for (int r = 0; r < R; ++r) {
    const int64_t token = item.token_begin + (row + r) / group;
    const int64_t head = item.kv_head * group + (row + r) % group;
    positions[r] = a.past_lens[item.sequence] + token - a.cu_seqlens[item.sequence];
    const float* from = a.q + token * a.q_stride + head * D;
    if (a.rotary_dim > 0) {
      rotate(a, from, positions[r], q_rows[r]);
      from = q_rows[r];
    }
    for (int64_t d = 0; d < D; ++d) q_rows[r][d] = from[d] * a.scale;
    sums[r] = split_sums != nullptr ? split_sums + (row + r) * D : segment_sums[r];
    out[r] = a.out + token * a.heads * D + head * D;
  }

  if (split_sums != nullptr) {
    attend_rows<W, C, R>(a, item.sequence, item.kv_head, q_rows, positions, item.segment * kSegment,
                         (item.segment + 1) * kSegment, split_partials + row, sums);
    return;
  }
  Partial running[R], partial[R];
  for (int r = 0; r < R; ++r) {
    running[r] = {-INFINITY, 0.0f};
    std::fill(running_sums[r], running_sums[r] + D, 0.0f);
  }
  for (int64_t begin = first_key(a, positions[0]) / kSegment * kSegment; begin <= positions[R - 1]; begin += kSegment) {
    attend_rows<W, C, R>(a, item.sequence, item.kv_head, q_rows, positions, begin, begin + kSegment, partial, sums);
    for (int r = 0; r < R; ++r) fold(running[r], running_sums[r], partial[r], sums[r], D);
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t d = 0; d < D; ++d) out[r][d] = running_sums[r][d] / running[r].total;
  }
}

template <int W, class C>
INLINE void run_items(Plan& plan, int64_t begin, int64_t end) {
  const int64_t group = plan.args.heads / plan.args.kv_heads;
  for (int64_t i = begin; i < end; ++i) {
    const Item& item = plan.items[i];
    const bool split = item.segment >= 0;
    Partial* partials = split ? &plan.partials[item.slot] : nullptr;
    float* sums = split ? &plan.sums[item.slot * plan.args.head_dim] : nullptr;
    const int64_t rows = (item.token_end - item.token_begin) * group;
    for (int64_t t = item.token_begin; t < item.token_end && item.appends; ++t) append<C>(plan.args, item.sequence, t, item.kv_head);
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) run_rows<W, C, kRows>(plan, item, row, partials, sums);
    switch (rows - row) {
      case 3: run_rows<W, C, 3>(plan, item, row, partials, sums); break;
      case 2: run_rows<W, C, 2>(plan, item, row, partials, sums); break;
      case 1: run_rows<W, C, 1>(plan, item, row, partials, sums); break;
      default: break;
    }
  }
}

#if defined(__x86_64__)
template <class C>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(void* plan, int64_t begin,
                                                                                       int64_t end) {
  run_items<16, C>(*static_cast<Plan*>(plan), begin, end);
}
template <class C>
__attribute__((target("avx2,fma"))) void run_avx2(void* plan, int64_t begin, int64_t end) {
  run_items<8, C>(*static_cast<Plan*>(plan), begin, end);
}
#endif
template <class C>
void run_portable(void* plan, int64_t begin, int64_t end) {
  run_items<4, C>(*static_cast<Plan*>(plan), begin, end);
}

template <class C>
cast24_task task_of_isa() {
#if defined(__x86_64__)
  if (std::strncmp(cast24_isa(), "avx512", 6) == 0) return run_avx512<C>;  // its extensions serve linears only
  if (std::strcmp(cast24_isa(), "avx2") == 0) return run_avx2<C>;
#endif
  return run_portable<C>;
}

// Work items of one call. Segments of a split sequence take consecutive slots, in order.
void make_items(Plan& plan) {
  const Args& a = plan.args;
  const int64_t group = a.heads / a.kv_heads;
  int64_t slots = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t begin = a.cu_seqlens[b], end = a.cu_seqlens[b + 1];
    const int64_t first = first_key(a, a.past_lens[b]) / kSegment;
    const int64_t last = (a.past_lens[b] + end - begin - 1) / kSegment;
    const bool split = end - begin <= kSplitTokens && last > first;
    const bool appends = !split && end - begin <= kTokensPerItem;
    for (int64_t t = begin; t < end && !appends; ++t) plan.appended_before.emplace_back(b, t);
    for (int64_t h = 0; h < a.kv_heads && end > begin; ++h) {
      if (split) {
        for (int64_t s = first; s <= last; ++s, slots += (end - begin) * group) {
          plan.items.push_back({b, begin, end, h, s, slots, false});
        }
      } else {
        for (int64_t t = begin; t < end; t += kTokensPerItem) {
          plan.items.push_back({b, t, std::min(end, t + kTokensPerItem), h, -1, 0, appends});
        }
      }
    }
  }
  plan.partials.resize(slots);
  plan.sums.resize(slots * a.head_dim);
}

void fold_splits(Plan& plan) {
  const Args& a = plan.args;
  const int64_t D = a.head_dim, group = a.heads / a.kv_heads;
  for (size_t i = 0; i < plan.items.size();) {
    const Item& item = plan.items[i];
    if (item.segment < 0) {
      ++i;
      continue;
    }
    const int64_t rows = (item.token_end - item.token_begin) * group;
    size_t next = i;
    while (next < plan.items.size() && plan.items[next].segment >= 0 &&
           plan.items[next].sequence == item.sequence && plan.items[next].kv_head == item.kv_head) {
      ++next;
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* out = a.out + (item.token_begin + row / group) * a.heads * D + (item.kv_head * group + row % group) * D;
      Partial running = {-INFINITY, 0.0f};
      std::fill(out, out + D, 0.0f);
      for (size_t j = i; j < next; ++j) {
        const int64_t slot = plan.items[j].slot + row;
        fold(running, out, plan.partials[slot], &plan.sums[slot * D], D);
      }
      for (int64_t d = 0; d < D; ++d) out[d] /= running.total;
    }
    i = next;
  }
}

template <class C>
void append_range(void* self, int64_t begin, int64_t end) {
  const Plan& plan = *static_cast<Plan*>(self);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t h = 0; h < plan.args.kv_heads; ++h)
      append<C>(plan.args, plan.appended_before[i].first, plan.appended_before[i].second, h);
}

template <class C>
void attend(const Args& args, cast24_parallel_for run, void* pool) {
  Plan plan{args, {}, {}, {}, {}};
  make_items(plan);
  const int64_t before = static_cast<int64_t>(plan.appended_before.size());
  if (before <= 32) {  // not worth waking the other threads
    append_range<C>(&plan, 0, before);
  } else {
    run(pool, append_range<C>, &plan, before);
  }
  run(pool, task_of_isa<C>(), &plan, static_cast<int64_t>(plan.items.size()));
  fold_splits(plan);
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, cast24_parallel_for run, void* pool) {
  args.bf16_cache ? attend<uint16_t>(args, run, pool) : attend<float>(args, run, pool);
}

}  // namespace cast24
