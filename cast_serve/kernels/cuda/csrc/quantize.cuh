// Rows of x rounded to 8 bits, each with a scale of its own.
#pragma once

namespace cast24 {

struct QuantizeArguments {
  const unsigned short* x;  // [M, K], rows x_stride elements apart, 16-byte aligned, K a multiple of 8
  unsigned char* quantized;  // [M, K], rows quantized_stride bytes apart, a multiple of 8; or [M, K up to a multiple of 64]
  float* scale;              // [M]: x = quantized * scale
  long long x_stride, quantized_stride;
  int K, for_products;       // 1: groups of four columns as `in_8_bits` has them, for a packed weight, then zeros
};

constexpr int kQuantizeThreads = 256;

__device__ __forceinline__ float larger(float a, float b) { return a < b ? b : a; }

// A block for each row; the row is read twice, the second time from a cache.
template <class In, class T>
__device__ __forceinline__ void round_row(const QuantizeArguments& arg) {
  __shared__ float maxima[kQuantizeThreads];
  const unsigned short* row = arg.x + blockIdx.x * arg.x_stride;
  float largest = 0.0f;
  for (int k = 8 * threadIdx.x; k < arg.K; k += 8 * kQuantizeThreads) {
    const uint4 v = load(reinterpret_cast<const uint4*>(row + k));
    for (unsigned word : {v.x, v.y, v.z, v.w}) {
      largest = larger(largest, magnitude(to_float(In(), static_cast<unsigned short>(word & 0xffff))));
      largest = larger(largest, magnitude(to_float(In(), static_cast<unsigned short>(word >> 16))));
    }
  }
  maxima[threadIdx.x] = largest;
  __syncthreads();
  for (int half = kQuantizeThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) maxima[threadIdx.x] = larger(maxima[threadIdx.x], maxima[threadIdx.x + half]);
    __syncthreads();
  }
  // a row of zeros, or of numbers so small that the inverse would be infinite, becomes zeros
  const float scale = maxima[0] > 1e-30f ? maxima[0] / kLargest<T> : 1.0f, inverse = 1.0f / scale;
  if (threadIdx.x == 0) arg.scale[blockIdx.x] = scale;
  unsigned char* out = arg.quantized + blockIdx.x * arg.quantized_stride;
  const int end = arg.for_products ? (arg.K + 63) / 64 * 64 : arg.K;
  for (int k = 8 * threadIdx.x; k < end; k += 8 * kQuantizeThreads) {
    const uint4 v = k < arg.K ? load(reinterpret_cast<const uint4*>(row + k)) : make_uint4(0, 0, 0, 0);
    unsigned long long bytes = 0;
    int shift = 0;
    for (unsigned word : {v.x, v.y, v.z, v.w}) {
      const float low = to_float(In(), static_cast<unsigned short>(word & 0xffff)) * inverse;
      const float high = to_float(In(), static_cast<unsigned short>(word >> 16)) * inverse;
      bytes |= static_cast<unsigned long long>(to_8_bits(T(), low, high)) << shift;
      shift += 16;
    }
    if (arg.for_products) {
      *reinterpret_cast<unsigned*>(out + in_8_bits(k)) = static_cast<unsigned>(bytes);
      *reinterpret_cast<unsigned*>(out + in_8_bits(k + 4)) = static_cast<unsigned>(bytes >> 32);
    } else {
      *reinterpret_cast<unsigned long long*>(out + k) = bytes;
    }
  }
}

}  // namespace cast24

#define CAST24_QUANTIZE(In, T)                                                                         \
  extern "C" __global__ void __launch_bounds__(cast24::kQuantizeThreads)                               \
      quantize_rows(const cast24::QuantizeArguments arg) {                                             \
    cast24::round_row<cast24::In, cast24::T>(arg);                                                     \
  }
