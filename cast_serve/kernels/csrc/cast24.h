/* 2:4 sparse and dense linear layers on the CPU: plain C, no torch and no ONNX Runtime.
 *
 * Everywhere: x is float32 [M, K] and y is float32 [M, N], both contiguous and row-major; bias is float32 [N] or NULL;
 * bf16 values are the upper 16 bits of a float32, as uint16_t. No pointer needs more than its element's alignment.
 * Panels of quantized weights, which are bytes, start on a multiple of 4. Sums are float32. 2:4 bf16 weights meet x rounded
 * to bf16 on a CPU that multiplies pairs of bf16 fast ("avx512bf16" below), x as it is on others. A row of y depends on its
 * own row of x only, bit for bit: neither M, nor the other rows, nor the number of threads changes it (another instruction
 * set may).
 *
 * Panel layout (P = ceil(N / 16) panels of 16 rows, zero rows as padding; G = K / 4 groups; K a multiple of 8):
 *   values  f32  [P, G, 2, 16]          slot 0 and slot 1 of the group, for each of the 16 rows
 *           bf16 [P, G, 16, 2]          the two slots of a row share a 32-bit word, slot 0 in the low half
 *   indices u32  [P, ceil(G / 8), 16]   group g: word g / 8, bits 4 * (g % 8) + {0, 1} and + {2, 3} are the columns (0..3)
 *                                       of slot 0 and slot 1; padding has columns 0 and 1
 */
#ifndef CAST24_H
#define CAST24_H

#include <stdint.h>

#define CAST24_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Work on units begin <= i < end. Units are independent and of about equal cost. */
typedef void (*cast24_task)(void* arg, int64_t begin, int64_t end);

/* Call task(arg, ...) on ranges that cover 0..n exactly once, on any threads, and return when all are done.
 * `pool` is the caller's own, passed through. Where a parameter of this type is NULL, everything runs on the caller. */
typedef void (*cast24_parallel_for)(void* pool, cast24_task task, void* arg, int64_t n);

/* What is done around a product, so that it takes no pass of its own. Where a pointer to one is NULL: nothing.
 *   norm      f32 [K] or NULL: before, each row of x is divided by the root of its mean square plus epsilon, and multiplied
 *             by this
 *   gated     not 0: the weight's rows are 16 of a gate and 16 that it opens, in turn (N a multiple of 32), and
 *             y [M, N / 2] = silu(gate) * other
 *   residual  f32 of y's shape, or NULL: added to y */
typedef struct {
  const float* norm;
  float epsilon;
  int gated;
  const float* residual;
} cast24_fusion;

/* y = x W^T + bias with W [N, K] 2:4 in panel layout. */
CAST24_API void cast24_linear_f32(const float* x, const float* values, const uint32_t* indices, const float* bias,
                                  const cast24_fusion* fusion, float* y, int64_t M, int64_t N, int64_t K,
                                  cast24_parallel_for run, void* pool);
CAST24_API void cast24_linear_bf16(const float* x, const uint16_t* values, const uint32_t* indices, const float* bias,
                                   const cast24_fusion* fusion, float* y, int64_t M, int64_t N, int64_t K,
                                   cast24_parallel_for run, void* pool);

/* y = x W^T + bias with W [N, K] dense and row-major, any K. */
CAST24_API void cast24_dense_linear_f32(const float* x, const float* weight, const float* bias, float* y, int64_t M,
                                        int64_t N, int64_t K, cast24_parallel_for run, void* pool);
CAST24_API void cast24_dense_linear_bf16(const float* x, const uint16_t* weight, const float* bias, float* y, int64_t M,
                                         int64_t N, int64_t K, cast24_parallel_for run, void* pool);

/* Portable format (values [N, K/2], bitmask [N, K/8]) to panel layout; K a multiple of 8.
 * Returns -1, or row * (K / 4) + group of the first group that does not keep exactly two (outputs are then undefined). */
CAST24_API int64_t cast24_prepack_f32(const float* values, const uint8_t* bitmask, int64_t N, int64_t K,
                                      float* panel_values, uint32_t* panel_indices);
CAST24_API int64_t cast24_prepack_bf16(const uint16_t* values, const uint8_t* bitmask, int64_t N, int64_t K,
                                       uint16_t* panel_values, uint32_t* panel_indices);

/* y = x W^T + bias straight from the portable format, packing each panel into scratch: slow, bit-identical to the packed
 * form. Returns as prepack does (y is then undefined). */
CAST24_API int64_t cast24_linear_bitmask_f32(const float* x, const float* values, const uint8_t* bitmask,
                                             const float* bias, float* y, int64_t M, int64_t N, int64_t K,
                                             cast24_parallel_for run, void* pool);
CAST24_API int64_t cast24_linear_bitmask_bf16(const float* x, const uint16_t* values, const uint8_t* bitmask,
                                              const float* bias, float* y, int64_t M, int64_t N, int64_t K,
                                              cast24_parallel_for run, void* pool);

/* Quantized weights, 2:4 or dense: int8 (-127..127) or int4, a float scale for each row and group of columns. K is a
 * multiple of 8, `group` 32, 64, 128 or 256. A panel of 16 rows is one run of bytes, read front to back; for each group:
 *   scale f32 [16], sum i16 [16] of the group's integers, then for each 32 columns (K is padded with zeros):
 *   2:4    index u8 [16, 4]: byte i of a row has, in bits 2 b and 2 b + 1, the column within its group (0..3) of what block
 *          b keeps in place i; int8 [4, 16, 4]: block b has the four kept of columns 8 b .. 8 b + 7 of each row;
 *          or int4 [2, 16, 4] bytes: byte c has block 2 c in its low half, block 2 c + 1 in its high half
 *   dense  int8 [8, 16, 4]: block b has columns 4 b .. 4 b + 3; or int4 [4, 16, 4] bytes, halves as above
 */
CAST24_API int64_t cast24_quantized_panel_bytes(int bits, int sparse, int64_t K, int64_t group);

/* Portable format to panels: values int8, or two int4 in a byte (the first in its low half), [N, K/2] or dense [N, K];
 * bitmask [N, K/8], or NULL for dense; scale [N, ceil(K / scale_columns)], scale_columns a multiple of group or all of K.
 * Returns -1, or row * (K / 4) + group of the first group of four that does not keep exactly two. */
CAST24_API int64_t cast24_prepack_quantized(const uint8_t* values, const uint8_t* bitmask, const float* scale,
                                            int64_t scale_columns, int64_t N, int64_t K, int bits, int64_t group,
                                            uint8_t* panels);

/* y = x W^T + bias. x is rounded to 8 bits with a scale for each row and group, and products are summed exactly; or, with
 * float_activations, x is used as it is, which is slower. */
CAST24_API void cast24_linear_quantized(const float* x, const uint8_t* panels, const float* bias,
                                        const cast24_fusion* fusion, float* y, int64_t M, int64_t N, int64_t K, int bits,
                                        int sparse, int64_t group, int float_activations, cast24_parallel_for run, void* pool);

/* Rows `rows` of a dense quantized weight as float32: out [count, K]. */
CAST24_API void cast24_quantized_rows(const int64_t* rows, int64_t count, const uint8_t* panels, int64_t K, int bits,
                                      int64_t group, float* out);

/* Name of the instruction set in use: "avx512wide" (for Intel's CPUs with VNNI and VBMI), "avx512bf16",
 * "avx512vnni", "avx512", "avx2", "neondot", "neon" or "portable". The best one that CPU and operating system support, unless
 * the environment variable CAST24_ISA or cast24_set_isa names another. */
CAST24_API const char* cast24_isa(void);

/* Use the named instruction set from now on. Returns 0, or -1 (nothing changed) if it is unknown or the CPU lacks it. */
CAST24_API int cast24_set_isa(const char* name);

#ifdef __cplusplus
}
#endif

#endif
