// Dense linear on a row-major weight, so that a tied embedding is held once for its gather and for the logits.
#include "cast24.h"
#include "isa.h"
#include "parallel.h"

namespace cast24 {
namespace {

inline auto dense_of(const Isa& isa, const float*) { return isa.dense_f32; }
inline auto dense_of(const Isa& isa, const uint16_t*) { return isa.dense_bf16; }

template <class T>
void dense_linear(const float* x, const T* weight, const float* bias, float* y, int64_t M, int64_t N, int64_t K,
                  cast24_parallel_for run, void* pool) {
  const auto dense = dense_of(isa(), weight);
  parallel_for(run, pool, (N + kDenseRows - 1) / kDenseRows, M * N * K, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * kDenseRows;
      const int outputs = static_cast<int>(N - first < kDenseRows ? N - first : kDenseRows);
      dense(x, M, K, weight + first * K, bias ? bias + first : nullptr, outputs, y + first, N);
    }
  });
}

}  // namespace
}  // namespace cast24

void cast24_dense_linear_f32(const float* x, const float* weight, const float* bias, float* y, int64_t M, int64_t N,
                             int64_t K, cast24_parallel_for run, void* pool) {
  cast24::dense_linear(x, weight, bias, y, M, N, K, run, pool);
}

void cast24_dense_linear_bf16(const float* x, const uint16_t* weight, const float* bias, float* y, int64_t M, int64_t N,
                              int64_t K, cast24_parallel_for run, void* pool) {
  cast24::dense_linear(x, weight, bias, y, M, N, K, run, pool);
}
