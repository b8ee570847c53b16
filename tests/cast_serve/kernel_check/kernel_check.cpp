// Runs every kernel on every instruction set of this CPU, at odd shapes, against plain sums in double. A program of its own,
// so that it can be built with sanitizers and run by an emulator of another CPU.
//
//   kernel_check [NAME...]   the instruction sets to run; without any, all that the CPU has
//
// Every array has its exact size on the heap, and starts where its element's alignment allows no more than that.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "cast24.h"
#include "ort/paged_attention.h"

namespace {

std::mt19937 engine(1);
int checks = 0;

void require(bool condition, const std::string& what) {
  ++checks;
  if (condition) return;
  std::fprintf(stderr, "kernel_check: %s: %s\n", cast24_isa(), what.c_str());
  std::exit(1);
}

int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine); }
float normal() { return std::normal_distribution<float>()(engine); }

// `size` elements, one element behind the start of an allocation that ends with them.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t size) : memory_(new T[size + 1]()), size_(size) {}
  T* data() { return memory_.get() + 1; }
  const T* data() const { return memory_.get() + 1; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return size_; }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t size_;
};

// Panels of bytes hold floats: the caller aligns them to four bytes, and no more.
class Panels {
 public:
  explicit Panels(int64_t bytes) : floats_(bytes / 4) { require(bytes % 4 == 0, "panels are no whole floats"); }
  uint8_t* data() { return reinterpret_cast<uint8_t*>(floats_.data()); }

 private:
  Exact<float> floats_;
};

Exact<float> random_floats(int64_t size) {
  Exact<float> x(size);
  for (int64_t i = 0; i < size; ++i) x[i] = normal();
  return x;
}

uint16_t to_bf16(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Three pieces, two of them on threads of their own.
void on_threads(void*, cast24_task task, void* arg, int64_t n) {
  const int64_t cuts[4] = {0, n / 3, n / 2, n};
  std::thread first(task, arg, cuts[0], cuts[1]), second(task, arg, cuts[1], cuts[2]);
  task(arg, cuts[2], cuts[3]);
  first.join();
  second.join();
}

// y [M, N] must be x W^T + bias within a float32 sum's rounding.
void compare(const std::string& what, const Exact<float>& y, const Exact<float>& x, const std::vector<double>& weight,
             const float* bias, int64_t M, int64_t N, int64_t K) {
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = bias ? bias[n] : 0, size = 1;
      for (int64_t k = 0; k < K; ++k) {
        sum += x[m * K + k] * weight[n * K + k];
        size += std::abs(x[m * K + k] * weight[n * K + k]);
      }
      require(std::abs(y[m * N + n] - sum) <= 2e-6 * size, what + " is wrong");
    }
}

// What may be done around a product, with the result that it must have.
struct Fused {
  Exact<float> norm, residual;
  cast24_fusion fusion;

  Fused(bool normed, bool gated, int64_t M, int64_t N, int64_t K)
      : norm(random_floats(K)), residual(random_floats(M * (gated ? N / 2 : N))),
        fusion{normed ? norm.data() : nullptr, 0.25f, gated, residual.data()} {}

  void compare(const std::string& what, const Exact<float>& y, const Exact<float>& x, const std::vector<double>& weight,
               const float* bias, int64_t M, int64_t N, int64_t K, double tolerance) const {
    std::vector<double> in(K), sums(N), sizes(N);
    for (int64_t m = 0; m < M; ++m) {
      double squares = 0;
      for (int64_t k = 0; k < K; ++k) squares += static_cast<double>(x[m * K + k]) * x[m * K + k];
      const double inverse = 1 / std::sqrt(squares / static_cast<double>(K) + fusion.epsilon);
      for (int64_t k = 0; k < K; ++k) in[k] = x[m * K + k] * (fusion.norm ? inverse * norm[k] : 1);
      for (int64_t n = 0; n < N; ++n) {
        sums[n] = bias ? bias[n] : 0, sizes[n] = 1;
        for (int64_t k = 0; k < K; ++k) {
          sums[n] += in[k] * weight[n * K + k];
          sizes[n] += std::abs(in[k] * weight[n * K + k]);
        }
      }
      for (int64_t n = 0; n < (fusion.gated ? N / 2 : N); ++n) {
        const int64_t gate = n / 16 * 32 + n % 16, other = gate + 16;
        const double silu = fusion.gated ? sums[gate] / (1 + std::exp(-sums[gate])) : 0;
        const double expected = residual[m * (fusion.gated ? N / 2 : N) + n] + (fusion.gated ? silu * sums[other] : sums[n]);
        const double size = fusion.gated ? sizes[gate] * (1 + std::abs(sums[other])) + std::abs(silu) * sizes[other] : sizes[n];
        require(std::abs(y[m * (fusion.gated ? N / 2 : N) + n] - expected) <= tolerance * size, what + " is wrong");
      }
    }
  }
};

std::string shape(int64_t M, int64_t N, int64_t K) {
  return " [" + std::to_string(M) + ", " + std::to_string(K) + "] x [" + std::to_string(N) + ", " + std::to_string(K) + "]";
}

// Which two of every four columns are kept, at random: the bitmask [N, K/8].
Exact<uint8_t> random_bitmask(int64_t N, int64_t K) {
  constexpr int kNibbles[6] = {3, 5, 6, 9, 10, 12};
  Exact<uint8_t> mask(N * K / 8);
  for (int64_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<uint8_t>(kNibbles[below(6)] | kNibbles[below(6)] << 4);
  return mask;
}

// Column of the i-th kept value of a row.
std::vector<int64_t> kept_columns(const Exact<uint8_t>& mask, int64_t row, int64_t K) {
  std::vector<int64_t> columns;
  for (int64_t k = 0; k < K; ++k)
    if (mask[(row * K + k) / 8] >> k % 8 & 1) columns.push_back(k);
  return columns;
}

constexpr int64_t kRows[] = {1, 15, 16, 17, 32, 33, 65}, kColumns[] = {8, 24, 40, 72, 136, 2056};
constexpr int64_t kLargest = 65;  // rows of x: more than one tile

// The numbers of rows of x to try: all small ones where that is cheap.
std::vector<int64_t> batches(int64_t N, int64_t K) {
  if (N * K > 20000) return {1, 5, kLargest};
  std::vector<int64_t> all = {kLargest};
  if (N * K <= 1500) all.push_back(230);  // more than a block of rows that lie column by column
  for (int64_t M = 1; M <= 17; ++M) all.push_back(M);
  return all;
}

template <class T>
T stored(float value) {
  if constexpr (std::is_same_v<T, float>) return value;
  else return to_bf16(value);
}

template <class T>
double loaded(T value) {
  if constexpr (std::is_same_v<T, float>) return value;
  else return from_bf16(value);
}

template <class T>
void check_sparse(int64_t N, int64_t K) {
  constexpr bool kBf16 = !std::is_same_v<T, float>;
  const auto prepack = [](auto... a) { if constexpr (kBf16) return cast24_prepack_bf16(a...); else return cast24_prepack_f32(a...); };
  const auto linear = [](auto... a) { if constexpr (kBf16) cast24_linear_bf16(a...); else cast24_linear_f32(a...); };
  const auto portable = [](auto... a) { if constexpr (kBf16) return cast24_linear_bitmask_bf16(a...); else return cast24_linear_bitmask_f32(a...); };
  const bool rounds = kBf16 && std::string(cast24_isa()) == "avx512bf16";

  const int64_t panels = (N + 15) / 16;
  Exact<uint8_t> mask = random_bitmask(N, K);
  Exact<T> values(N * K / 2), panel_values(panels * K / 4 * 32);
  Exact<uint32_t> indices(panels * ((K / 4 + 7) / 8) * 16);
  std::vector<double> weight(N * K);
  for (int64_t n = 0; n < N; ++n) {
    const std::vector<int64_t> columns = kept_columns(mask, n, K);
    for (size_t i = 0; i < columns.size(); ++i) {
      values[n * K / 2 + static_cast<int64_t>(i)] = stored<T>(normal());
      weight[n * K + columns[i]] = loaded(values[n * K / 2 + static_cast<int64_t>(i)]);
    }
  }
  require(prepack(values.data(), mask.data(), N, K, panel_values.data(), indices.data()) == -1, "prepack refuses a weight");
  const Exact<float> bias = random_floats(N);
  for (int64_t M : batches(N, K)) {
    const std::string what = (kBf16 ? "2:4 bf16" : "2:4 f32") + shape(M, N, K);
    Exact<float> x = random_floats(M * K), y(M * N), again(M * N);
    for (bool gated : {false, true}) {
      if (gated && N % 32 != 0) continue;
      const Fused fused(true, gated, M, N, K);
      Exact<float> out(fused.residual.size());
      linear(x.data(), panel_values.data(), indices.data(), bias.data(), &fused.fusion, out.data(), M, N, K, on_threads, nullptr);
      fused.compare(what + (gated ? " normed, gated" : " normed"), out, x, weight, bias.data(), M, N, K, rounds ? 5e-3 : 2e-6);
    }
    linear(x.data(), panel_values.data(), indices.data(), bias.data(), nullptr, y.data(), M, N, K, on_threads, nullptr);
    require(portable(x.data(), values.data(), mask.data(), bias.data(), again.data(), M, N, K, nullptr, nullptr) == -1, what);
    require(std::memcmp(y.data(), again.data(), sizeof(float) * M * N) == 0, what + " from the portable format differs");
    if (rounds)
      for (int64_t i = 0; i < x.size(); ++i) x[i] = from_bf16(to_bf16(x[i]));
    compare(what, y, x, weight, bias.data(), M, N, K);
  }

  const int64_t group = below(N * K / 4);
  mask[group / 2] = static_cast<uint8_t>(group % 2 ? (mask[group / 2] & 15) | 0x70 : (mask[group / 2] & 0xf0) | 1);
  Exact<float> x = random_floats(K), y(N);
  require(prepack(values.data(), mask.data(), N, K, panel_values.data(), indices.data()) == group, "a bad group is not named");
  require(portable(x.data(), values.data(), mask.data(), nullptr, y.data(), 1, N, K, on_threads, nullptr) == group,
          "a bad group is not named");
}

template <class T>
void check_dense(int64_t N, int64_t K) {
  constexpr bool kBf16 = !std::is_same_v<T, float>;
  Exact<T> values(N * K);
  std::vector<double> weight(N * K);
  for (int64_t i = 0; i < N * K; ++i) weight[i] = loaded(values[i] = stored<T>(normal()));
  for (int64_t M : batches(N, K)) {
    const Exact<float> x = random_floats(M * K);
    Exact<float> y(M * N);
    if constexpr (kBf16)
      cast24_dense_linear_bf16(x.data(), values.data(), nullptr, y.data(), M, N, K, on_threads, nullptr);
    else
      cast24_dense_linear_f32(x.data(), values.data(), nullptr, y.data(), M, N, K, on_threads, nullptr);
    compare((kBf16 ? "dense bf16" : "dense f32") + shape(M, N, K), y, x, weight, nullptr, M, N, K);
  }
}

// Inputs that rounding to 8 bits leaves as they are: in each group, multiples up to 127 of a power of two.
Exact<float> exactly_rounded(int64_t M, int64_t K, int64_t group) {
  Exact<float> x(M * K);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k) {
      const float unit = std::ldexp(1.0f, static_cast<int>(k / group % 7) - 4);
      x[m * K + k] = unit * static_cast<float>(k % group == 0 ? (m % 2 ? 127 : -127) : below(255) - 127);
    }
  return x;
}

void check_quantized(int bits, bool sparse, int64_t group, bool one_scale, int64_t N, int64_t K) {
  const int64_t kept = sparse ? K / 2 : K, scale_columns = one_scale ? K : group, scales = (K + scale_columns - 1) / scale_columns;
  const int lowest = bits == 8 ? -127 : -8, highest = bits == 8 ? 127 : 7;
  Exact<uint8_t> mask = random_bitmask(N, K), values(N * kept * bits / 8);
  Exact<float> scale(N * scales);
  for (int64_t i = 0; i < scale.size(); ++i) scale[i] = (below(2) ? 1.0f : -1.0f) * (0.1f + std::abs(normal()));
  std::vector<double> weight(N * K);
  for (int64_t n = 0; n < N; ++n) {
    const std::vector<int64_t> columns = kept_columns(mask, n, K);
    for (int64_t i = 0; i < kept; ++i) {
      const int code = static_cast<int>(lowest + below(highest - lowest + 1));
      const int64_t column = sparse ? columns[static_cast<size_t>(i)] : i;
      if (bits == 8) values[n * kept + i] = static_cast<uint8_t>(code);
      else values[(n * kept + i) / 2] |= static_cast<uint8_t>((code & 15) << (i % 2 ? 4 : 0));
      weight[n * K + column] = static_cast<double>(code) * scale[n * scales + column / scale_columns];
    }
  }
  const int64_t panel_bytes = cast24_quantized_panel_bytes(bits, sparse, K, group);
  Panels panels((N + 15) / 16 * panel_bytes);
  require(cast24_prepack_quantized(values.data(), sparse ? mask.data() : nullptr, scale.data(), scale_columns, N, K, bits, group,
                                   panels.data()) == -1, "prepack refuses a quantized weight");
  const Exact<float> bias = random_floats(N);
  for (int64_t M : batches(N, K))
    for (int float_activations : {0, 1}) {
      const Exact<float> x = float_activations ? random_floats(M * K) : exactly_rounded(M, K, group);
      Exact<float> y(M * N);
      const std::string what = "int" + std::to_string(bits) + (sparse ? " 2:4" : " dense") + shape(M, N, K);
      cast24_linear_quantized(x.data(), panels.data(), bias.data(), nullptr, y.data(), M, N, K, bits, sparse, group,
                              float_activations, on_threads, nullptr);
      compare(what, y, x, weight, bias.data(), M, N, K);
      for (bool gated : {false, true}) {
        if (gated && N % 32 != 0) continue;
        const Fused fused(float_activations, gated, M, N, K);  // normed inputs would not be exact when rounded
        Exact<float> out(fused.residual.size());
        cast24_linear_quantized(x.data(), panels.data(), bias.data(), &fused.fusion, out.data(), M, N, K, bits, sparse, group,
                                float_activations, on_threads, nullptr);
        fused.compare(what + (gated ? " fused, gated" : " fused"), out, x, weight, bias.data(), M, N, K, 2e-6);
      }
    }

  // What 8 bits cannot hold: infinities, NaN, all zeros, and numbers whose scale has no inverse.
  for (float odd : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(), 0.0f, 1e-44f}) {
    Exact<float> x(K), y(N);
    for (int64_t k = 0; k < K; ++k) x[k] = odd;
    cast24_linear_quantized(x.data(), panels.data(), nullptr, nullptr, y.data(), 1, N, K, bits, sparse, group, 0, nullptr, nullptr);
    for (int64_t n = 0; n < N; ++n) require(std::isfinite(odd) == (std::abs(y[n]) < 1e-30f), "what is not finite must stay so");
  }

  if (sparse) return;
  Exact<int64_t> rows(5);
  for (int64_t i = 0; i < rows.size(); ++i) rows[i] = i == 0 ? N - 1 : below(N);
  Exact<float> out(rows.size() * K);
  cast24_quantized_rows(rows.data(), rows.size(), panels.data(), K, bits, group, out.data());
  for (int64_t i = 0; i < rows.size(); ++i)
    for (int64_t k = 0; k < K; ++k)
      require(std::abs(out[i * K + k] - weight[rows[i] * K + k]) <= 1e-6 * std::abs(weight[rows[i] * K + k]), "a row read back is wrong");
}

struct AttentionShape {
  int64_t heads, kv_heads, head_dim, block_size, rotary_dim, window;
  bool interleaved;
  float softcap;
};

// Attention of query row t of a sequence whose queries and keys are rotated.
double attention_at(const AttentionShape& s, const std::vector<double>& q, const std::vector<double>& k,
                    const std::vector<double>& v, int64_t t, int64_t head, int64_t d) {
  const int64_t kv_head = head / (s.heads / s.kv_heads);
  const int64_t first = s.window < 0 ? 0 : std::max<int64_t>(0, t - s.window + 1);
  std::vector<double> scores;
  double peak = -1e300, total = 0, sum = 0;
  for (int64_t j = first; j <= t; ++j) {
    double score = 0;
    for (int64_t i = 0; i < s.head_dim; ++i) score += q[(t * s.heads + head) * s.head_dim + i] * k[(j * s.kv_heads + kv_head) * s.head_dim + i];
    score *= 0.3;
    if (s.softcap > 0) score = s.softcap * std::tanh(score / s.softcap);
    scores.push_back(score);
    peak = std::max(peak, score);
  }
  for (int64_t j = first; j <= t; ++j) {
    const double p = std::exp(scores[static_cast<size_t>(j - first)] - peak);
    total += p;
    sum += p * v[(j * s.kv_heads + kv_head) * s.head_dim + d];
  }
  return sum / total;
}

std::vector<double> rotated(const AttentionShape& s, const float* x, int64_t position, const Exact<float>& cos, const Exact<float>& sin) {
  std::vector<double> out(x, x + s.head_dim);
  const int64_t half = s.rotary_dim / 2, step = s.interleaved ? 2 : 1, other = s.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const double a = x[i * step], b = x[i * step + other], c = cos[position * half + i], d = sin[position * half + i];
    out[i * step] = a * c - b * d;
    out[i * step + other] = b * c + a * d;
  }
  return out;
}

// Two sequences side by side, in chunks that mix prefill and decode, against the whole of each at once. The cache holds C:
// floats, or bf16 as uint16_t.
template <class C>
void check_attention(const AttentionShape& s, int64_t length) {
  const int64_t lengths[2] = {length, 19}, width = (s.heads + 2 * s.kv_heads) * s.head_dim;
  const int64_t max_blocks = (length + s.block_size - 1) / s.block_size, blocks = 2 * max_blocks;
  Exact<float> cos(length * s.rotary_dim / 2), sin(length * s.rotary_dim / 2);
  for (int64_t i = 0; i < cos.size(); ++i) {
    const float angle = 3 * normal();
    cos[i] = std::cos(angle);
    sin[i] = std::sin(angle);
  }
  const bool bf16 = std::is_same<C, uint16_t>::value;
  Exact<C> keys(blocks * s.block_size * s.kv_heads * s.head_dim), values(keys.size());
  std::memset(keys.data(), 0xff, sizeof(C) * keys.size());  // a NaN in both
  std::memset(values.data(), 0xff, sizeof(C) * values.size());
  Exact<int32_t> table(2 * max_blocks);
  for (int64_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(blocks - 1 - i);

  const Exact<float> inputs[2] = {random_floats(lengths[0] * width), random_floats(lengths[1] * width)};
  std::vector<double> q[2], k[2], v[2];
  for (int b = 0; b < 2; ++b)
    for (int64_t t = 0; t < lengths[b]; ++t) {
      const float* row = inputs[b].data() + t * width;
      for (int64_t h = 0; h < s.heads + s.kv_heads; ++h) {
        const std::vector<double> r = rotated(s, row + h * s.head_dim, t, cos, sin);
        std::vector<double>& to = h < s.heads ? q[b] : k[b];
        to.insert(to.end(), r.begin(), r.end());
      }
      v[b].insert(v[b].end(), row + (s.heads + s.kv_heads) * s.head_dim, row + width);
    }

  int64_t done[2] = {0, 0};
  for (int step = 0; done[0] < lengths[0] || done[1] < lengths[1]; ++step) {
    const int64_t chunk[2] = {step == 0 ? length - 6 : step % 4, step % 3 ? 1 : 7};
    int64_t tokens[2];
    for (int b = 0; b < 2; ++b) tokens[b] = std::min(chunk[b], lengths[b] - done[b]);
    const int64_t T = tokens[0] + tokens[1];
    if (T == 0) continue;
    Exact<float> x(T * width), out(T * s.heads * s.head_dim);
    Exact<int32_t> past(2), cu_seqlens(3);
    for (int b = 0; b < 2; ++b) {
      past[b] = static_cast<int32_t>(done[b]);
      cu_seqlens[b + 1] = static_cast<int32_t>(cu_seqlens[b] + tokens[b]);
      std::memcpy(x.data() + cu_seqlens[b] * width, inputs[b].data() + done[b] * width, sizeof(float) * tokens[b] * width);
    }
    cast24::PagedAttentionArgs args{};
    args.q = x.data();
    args.k = args.q + s.heads * s.head_dim;
    args.v = args.k + s.kv_heads * s.head_dim;
    args.q_stride = args.kv_stride = width;
    args.out = out.data();
    args.key_cache = keys.data();
    args.value_cache = values.data();
    args.bf16_cache = bf16;
    args.heads = s.heads;
    args.kv_heads = s.kv_heads;
    args.head_dim = s.head_dim;
    args.block_size = s.block_size;
    args.block_table = table.data();
    args.max_blocks = max_blocks;
    args.past_lens = past.data();
    args.cu_seqlens = cu_seqlens.data();
    args.batch = 2;
    args.cos = cos.data();
    args.sin = sin.data();
    args.rotary_dim = s.rotary_dim;
    args.interleaved = s.interleaved;
    args.scale = 0.3f;
    args.window = s.window;
    args.softcap = s.softcap;
    cast24::paged_attention(args, on_threads, nullptr);
    for (int b = 0; b < 2; ++b)
      for (int64_t t = 0; t < tokens[b]; ++t) {
        if (T > 100 && t % 37) continue;  // the reference is slow
        for (int64_t h = 0; h < s.heads; ++h)
          for (int64_t d = 0; d < s.head_dim; d += 5) {
            const double expected = attention_at(s, q[b], k[b], v[b], done[b] + t, h, d);
            require(std::abs(out[((cu_seqlens[b] + t) * s.heads + h) * s.head_dim + d] - expected) < (bf16 ? 3e-2 : 3e-5), "attention is wrong");
          }
      }
    for (int b = 0; b < 2; ++b) done[b] += tokens[b];
  }
}

void check_all() {
  for (int64_t N : kRows)
    for (int64_t K : kColumns) {
      if (N * K > 40000) continue;
      check_sparse<float>(N, K);
      check_sparse<uint16_t>(N, K);
    }
  for (int64_t N : {1, 3, 4, 5, 33})
    for (int64_t K : {1, 7, 16, 77}) {
      check_dense<float>(N, K);
      check_dense<uint16_t>(N, K);
    }
  for (int bits : {8, 4})
    for (bool sparse : {true, false}) {
      for (int64_t group : {32, 64, 128, 256})
        for (int64_t K : {8, 40, 264}) check_quantized(bits, sparse, group, group == 128, 33, K);
      for (int64_t N : {1, 16}) check_quantized(bits, sparse, 64, false, N, 136);
    }
  check_attention<float>({6, 2, 16, 16, 16, -1, false, 0}, 70);
  check_attention<float>({5, 1, 20, 32, 12, 9, true, 0}, 70);
  check_attention<float>({2, 2, 64, 64, 0, -1, false, 5}, 33);
  check_attention<float>({3, 1, 33, 16, 32, -1, false, 0}, 1100);
  check_attention<float>({4, 4, 8, 16, 8, 600, false, 0}, 1100);
  check_attention<uint16_t>({6, 2, 16, 16, 16, -1, false, 0}, 70);
  check_attention<uint16_t>({3, 1, 33, 16, 32, -1, false, 0}, 1100);
}

}  // namespace

int main(int count, char** names) {
  require(cast24_set_isa("avx1024") == -1 && cast24_set_isa("") == -1 && cast24_set_isa(nullptr) == -1, "an unknown name is taken");
  std::vector<std::string> wanted(names + 1, names + count);
  if (wanted.empty()) wanted = {"avx512wide", "avx512bf16", "avx512vnni", "avx512", "avx2", "neondot", "neon", "portable"};
  for (const std::string& isa : wanted) {
    if (cast24_set_isa(isa.c_str()) != 0) {
      std::printf("%s: not on this CPU\n", isa.c_str());
      continue;
    }
    require(isa == cast24_isa(), "another instruction set is in use than was set");
    checks = 0;
    check_all();
    std::printf("%s: %d results are right\n", isa.c_str(), checks);
  }
  return 0;
}
