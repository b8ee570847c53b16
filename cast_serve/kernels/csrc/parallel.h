// Running a lambda on the caller's threads.
#pragma once

#include "cast24.h"

namespace cast24 {

// Below this many multiply-adds, waking other threads costs more than it saves.
constexpr int64_t kSerialWork = 1 << 15;

// Calls f(begin, end) on ranges that cover 0..n; `work` is the number of multiply-adds in all.
template <class F>
void parallel_for(cast24_parallel_for run, void* pool, int64_t n, int64_t work, const F& f) {
  if (run == nullptr || n <= 1 || work < kSerialWork) return f(0, n);
  run(pool, [](void* arg, int64_t begin, int64_t end) { (*static_cast<const F*>(arg))(begin, end); },
      const_cast<F*>(&f), n);
}

}  // namespace cast24
