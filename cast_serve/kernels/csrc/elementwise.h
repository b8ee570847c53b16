// What stands between two linear layers, done inside them: one pass less over the threads, and over memory.
#pragma once

#include <stdint.h>

namespace cast24 {

// out [rows, K]: each row of x divided by the root of its mean square plus epsilon, times weight [K].
void rms_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t K, float* out);

// out [16] = silu(gate [16]) * up [16], where silu(g) = g / (1 + e^-g).
void silu_product(const float* gate, const float* up, float* out);

}  // namespace cast24
