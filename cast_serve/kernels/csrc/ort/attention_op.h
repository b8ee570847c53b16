// PagedAttention as an ONNX op: checks everything that indexes memory, then calls paged_attention.
#pragma once

#include <cmath>

#include "custom_op.h"
#include "paged_attention.h"

namespace cast24 {

// query [1, T, heads * D], or [1, T, (heads + 2 * kv_heads) * D] with key and value absent; key, value
// [1, T, kv_heads * D]; key_cache, value_cache f32 or bf16 [num_blocks, block_size, kv_heads, D], written in place, whose
// blocks' interior only this op reads (paged_attention.h); block_table i32 [B, max_blocks]; past_lens i32 [B]; cu_seqlens i32
// [B + 1]; cos_cache, sin_cache [positions, rotary_dim / 2] -> [1, T, heads * D].
struct PagedAttention : CpuOp {
  static constexpr const char* name = "PagedAttention";
  static constexpr Input inputs[] = {{kFloat, kRequired}, {kFloat, kOptional}, {kFloat, kOptional}, {kAnyType, kRequired},
                                     {kAnyType, kRequired}, {kInt32, kRequired}, {kInt32, kRequired}, {kInt32, kRequired},
                                     {kFloat, kOptional}, {kFloat, kOptional}};

  int64_t heads, kv_heads, window;
  bool do_rotary, interleaved;
  float scale, softcap;

  explicit PagedAttention(const Attributes& attributes)
      : heads(attributes.integer("num_heads")),
        kv_heads(attributes.integer("kv_num_heads")),
        window(attributes.integer("local_window_size", -1)),
        do_rotary(attributes.integer("do_rotary", 0) != 0),
        interleaved(attributes.integer("rotary_interleaved", 0) != 0),
        scale(attributes.real("scale", 0.0f)),
        softcap(attributes.real("softcap", 0.0f)) {
    require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "num_heads must be a multiple of kv_num_heads");
    require(window == -1 || window > 0, "local_window_size must be -1 or positive");
  }

  int64_t run(Context& context) const {
    const Tensor query = context.input(0), key = context.input(1), value = context.input(2);
    const Tensor key_cache = context.input(3), value_cache = context.input(4), block_table = context.input(5);
    const Tensor past_lens = context.input(6), cu_seqlens = context.input(7);
    const Tensor cos = context.input(8), sin = context.input(9);

    require(key_cache.shape.size() == 4 && key_cache.shape[2] == kv_heads,
            "key_cache has shape ", key_cache.shape, ", expected [num_blocks, block_size, ", kv_heads, ", head_dim]");
    const int64_t blocks = key_cache.shape[0], block_size = key_cache.shape[1], D = key_cache.shape[3];
    require_shape("value_cache", value_cache, {blocks, block_size, kv_heads, D});
    const bool bf16_cache = bf16_or_float("key_cache", key_cache);
    require_type("value_cache", value_cache, key_cache.type);
    require(block_size > 0 && block_size % kKeyTile == 0, "block_size must be a multiple of 16");
    require(D > 0 && D <= kMaxHeadDim, "head_dim must be 1 to 256, not ", D);

    require(query.shape.size() == 3, "query has shape ", query.shape, ", expected [1, T, width]");
    const int64_t T = query.shape[1];
    const bool packed = !key;
    require(packed == !value, "key and value must be given together");
    require_shape("query", query, {1, T, (packed ? heads + 2 * kv_heads : heads) * D});
    if (!packed) {
      require_shape("key", key, {1, T, kv_heads * D});
      require_shape("value", value, {1, T, kv_heads * D});
    }

    require(block_table.shape.size() == 2, "block_table has shape ", block_table.shape, ", expected [B, max_blocks]");
    const int64_t B = block_table.shape[0], max_blocks = block_table.shape[1];
    require_shape("past_lens", past_lens, {B});
    require_shape("cu_seqlens", cu_seqlens, {B + 1});

    PagedAttentionArgs args{};
    args.head_dim = D;
    if (do_rotary) {
      require(cos.shape.size() == 2 && 2 * cos.shape[1] <= D,
              "cos_cache has shape ", cos.shape, ", expected [positions, rotary_dim / 2]");
      require_shape("sin_cache", sin, {cos.shape[0], cos.shape[1]});
      args.rotary_dim = 2 * cos.shape[1];
    }

    args.block_table = static_cast<const int32_t*>(block_table.data);
    args.past_lens = static_cast<const int32_t*>(past_lens.data);
    args.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.data);
    require(args.cu_seqlens[0] == 0 && args.cu_seqlens[B] == T, "cu_seqlens must run from 0 to T");
    for (int64_t b = 0; b < B; ++b) {
      const int64_t tokens = args.cu_seqlens[b + 1] - args.cu_seqlens[b], length = args.past_lens[b] + tokens;
      require(tokens >= 0 && args.past_lens[b] >= 0, "cu_seqlens must not fall and past_lens not be negative");
      require(length <= max_blocks * block_size, "a sequence is longer than its row of block_table");
      require(!do_rotary || length <= cos.shape[0], "a sequence is longer than cos_cache has positions");
      for (int64_t i = 0; i * block_size < length; ++i) {
        const int32_t block = args.block_table[b * max_blocks + i];
        require(block >= 0 && block < blocks, "block_table names block ", block, " of ", blocks);
      }
    }

    args.q = query.f32();
    args.k = packed ? args.q + heads * D : key.f32();
    args.v = packed ? args.k + kv_heads * D : value.f32();
    args.q_stride = query.shape[2];
    args.kv_stride = packed ? query.shape[2] : kv_heads * D;
    args.out = context.output(0, {1, T, heads * D});
    args.key_cache = key_cache.data;
    args.value_cache = value_cache.data;
    args.bf16_cache = bf16_cache;
    args.heads = heads;
    args.kv_heads = kv_heads;
    args.block_size = block_size;
    args.max_blocks = max_blocks;
    args.batch = B;
    args.cos = cos.f32();
    args.sin = sin.f32();
    args.interleaved = interleaved;
    args.scale = scale != 0.0f ? scale : 1.0f / std::sqrt(static_cast<float>(D));
    args.window = window;
    args.softcap = softcap;
    paged_attention(args, Context::parallel_for, &context);
    return 0;
  }
};

}  // namespace cast24
