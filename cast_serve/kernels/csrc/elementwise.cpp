#include "elementwise.h"

#include <cmath>
#include <cstring>

#include "cast24.h"
#include "isa.h"
#include "vector.h"

namespace cast24 {
namespace {

template <int W>
CAST24_INLINE void norm_rows(const float* x, const float* weight, float epsilon, int64_t rows, int64_t K, float* out) {
  using V = Vec<W>;
  for (int64_t m = 0; m < rows; ++m, x += K, out += K) {
    typename V::F squares[4] = {};
    int64_t k = 0;
    for (; k + 4 * W <= K; k += 4 * W)
      for (int i = 0; i < 4; ++i) {
        const typename V::F v = V::load(x + k + i * W);
        squares[i] += v * v;
      }
    const typename V::F lanes = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    float sum = 0.0f;
    for (int i = 0; i < W; ++i) sum += lanes[i];
    for (int64_t rest = k; rest < K; ++rest) sum += x[rest] * x[rest];
    const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(K) + epsilon);
    for (k = 0; k + W <= K; k += W) V::store(out + k, V::load(x + k) * inverse * V::load(weight + k));
    for (; k < K; ++k) out[k] = x[k] * inverse * weight[k];
  }
}

template <int W>
CAST24_INLINE void silu_of_panel(const float* gate, const float* up, float* out) {
  using V = Vec<W>;
  for (int i = 0; i < kPanelRows; i += W) {
    const typename V::F g = V::load(gate + i), e = V::exp(g < 0 ? g : -g), one = typename V::F{} + 1.0f;
    V::store(out + i, g * V::load(up + i) * ((g < 0 ? e : one) / (one + e)));
  }
}

struct Elementwise {
  void (*norm)(const float* x, const float* weight, float epsilon, int64_t rows, int64_t K, float* out);
  void (*silu)(const float* gate, const float* up, float* out);
};

#if defined(__x86_64__)
#define CAST24_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define CAST24_AVX2 __attribute__((target("avx2,fma")))
CAST24_AVX512 void norm_avx512(const float* x, const float* weight, float epsilon, int64_t rows, int64_t K, float* out) {
  norm_rows<16>(x, weight, epsilon, rows, K, out);
}
CAST24_AVX512 void silu_avx512(const float* gate, const float* up, float* out) { silu_of_panel<16>(gate, up, out); }
CAST24_AVX2 void norm_avx2(const float* x, const float* weight, float epsilon, int64_t rows, int64_t K, float* out) {
  norm_rows<8>(x, weight, epsilon, rows, K, out);
}
CAST24_AVX2 void silu_avx2(const float* gate, const float* up, float* out) { silu_of_panel<8>(gate, up, out); }
#endif
void norm_portable(const float* x, const float* weight, float epsilon, int64_t rows, int64_t K, float* out) {
  norm_rows<4>(x, weight, epsilon, rows, K, out);
}
void silu_portable(const float* gate, const float* up, float* out) { silu_of_panel<4>(gate, up, out); }

Elementwise elementwise() {
#if defined(__x86_64__)
  if (std::strncmp(cast24_isa(), "avx512", 6) == 0) return {norm_avx512, silu_avx512};
  if (std::strcmp(cast24_isa(), "avx2") == 0) return {norm_avx2, silu_avx2};
#endif
  return {norm_portable, silu_portable};
}

}  // namespace

void rms_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t K, float* out) {
  elementwise().norm(x, weight, epsilon, rows, K, out);
}

void silu_product(const float* gate, const float* up, float* out) { elementwise().silu(gate, up, out); }

}  // namespace cast24
