// How a lane's part of a step of the weight lies in memory, and how it becomes operand A.
#pragma once

namespace cast24 {

// kTiles: of a step; kXBytes: of an element of x; kWords: of kept values of a lane and step; kScaledAtEnd: sums are
// multiplied by the scales of rows at the end; kGroups: while they are made, by scales of groups of columns.
template <class T>
struct Traits;
template <>
struct Traits<Bf16> {
  using Sum = float;
  static constexpr int kTiles = 2, kXBytes = 2, kWords = 8;
  static constexpr bool kScaledAtEnd = false, kGroups = false;
};
template <>
struct Traits<Fp16> : Traits<Bf16> {};
template <>
struct Traits<E4m3> {
  using Sum = float;
  static constexpr int kTiles = 1, kXBytes = 1, kWords = 4;
  static constexpr bool kScaledAtEnd = true, kGroups = false;
};
template <>
struct Traits<S8> : Traits<E4m3> {
  using Sum = int;
};
template <>
struct Traits<W8> {
  using Sum = float;
  static constexpr int kTiles = 2, kXBytes = 2, kWords = 4;
  static constexpr bool kScaledAtEnd = false, kGroups = true;
};
template <>
struct Traits<F8> : Traits<W8> {};
template <>
struct Traits<W4> : Traits<W8> {
  static constexpr int kWords = 2;
};

// Words of the lane in step `step` of all tiles' steps. kOnce: nobody else of the multiprocessor reads them.
template <bool kOnce = true, int kWords>
__device__ __forceinline__ void load_step(unsigned (&words)[kWords], const uint4* values, long long step, int lane) {
  if constexpr (kWords == 2) {
    const uint2* at = reinterpret_cast<const uint2*>(values) + step * 32 + lane;
    const uint2 v = kOnce ? load_once(at) : load(at);
    words[0] = v.x;
    words[1] = v.y;
  } else {
#pragma unroll
    for (int h = 0; h < kWords / 4; ++h) {
      const uint4* at = values + (step * (kWords / 4) + h) * 32 + lane;
      const uint4 v = kOnce ? load_once(at) : load(at);
      words[4 * h] = v.x;
      words[4 * h + 1] = v.y;
      words[4 * h + 2] = v.z;
      words[4 * h + 3] = v.w;
    }
  }
}

// Bytes 2 i and 2 i + 1 of a word, each 128 too large, as 16-bit floats. The byte becomes the lowest digits of a number
// whose last place is 1.
__device__ __forceinline__ unsigned pair_of_bytes(Bf16 type, unsigned word, int i) {
  const float low = __uint_as_float(bytes_of(word, 0x4b000000, 0x7440 + 2 * i)) - 8388736.0f;  // 2^23 + 128
  const float high = __uint_as_float(bytes_of(word, 0x4b000000, 0x7441 + 2 * i)) - 8388736.0f;
  return pair_of(type, low, high);
}
__device__ __forceinline__ unsigned pair_of_bytes(Fp16 type, unsigned word, int i) {
  return difference(type, bytes_of(word, 0x64646464, 0x4140 + 0x202 * i), 0x64806480);  // 1024 + 128
}

// Bytes 2 i and 2 i + 1 of a word, 8-bit floats (e4m3), as 16-bit floats. Their exponent and mantissa take the place of
// the wider ones', which makes a number too small by the difference of the two biases; below 2^-6 too.
__device__ __forceinline__ unsigned pair_of_floats(Bf16 type, unsigned word, int i) {
  const unsigned pair = bytes_of(word, 0, 0x1404 + 0x2020 * i);
  return product(type, (pair & 0x80008000) | (pair >> 4 & 0x07f007f0), 0x7b807b80);  // 2^120
}
__device__ __forceinline__ unsigned pair_of_floats(Fp16 type, unsigned word, int i) {
  const unsigned pair = bytes_of(word, 0, 0x1404 + 0x2020 * i);
  return product(type, (pair & 0x80008000) | (pair >> 1 & 0x3f803f80), 0x5c005c00);  // 2^8
}

// Half bytes i and i + 4 of a word, each 8 too large.
__device__ __forceinline__ unsigned pair_of_half_bytes(Bf16 type, unsigned word, int i) {
  return difference(type, (word >> 4 * i & 0x000f000f) | 0x43004300, 0x43084308);  // 128, 128 + 8
}
__device__ __forceinline__ unsigned pair_of_half_bytes(Fp16 type, unsigned word, int i) {
  return difference(type, (word >> 4 * i & 0x000f000f) | 0x64006400, 0x64086408);  // 1024, 1024 + 8
}

// Operand A of tile h of a step, for products in type `In`.
template <class In, class T>
__device__ __forceinline__ uint4 operand_a(In, T, const unsigned (&words)[Traits<T>::kWords], int h) {
  return make_uint4(words[4 * h], words[4 * h + 1], words[4 * h + 2], words[4 * h + 3]);
}
template <class In>
__device__ __forceinline__ uint4 operand_a(In in, W8, const unsigned (&words)[4], int h) {
  return make_uint4(pair_of_bytes(in, words[2 * h], 0), pair_of_bytes(in, words[2 * h], 1),
                    pair_of_bytes(in, words[2 * h + 1], 0), pair_of_bytes(in, words[2 * h + 1], 1));
}
template <class In>
__device__ __forceinline__ uint4 operand_a(In in, F8, const unsigned (&words)[4], int h) {
  return make_uint4(pair_of_floats(in, words[2 * h], 0), pair_of_floats(in, words[2 * h], 1),
                    pair_of_floats(in, words[2 * h + 1], 0), pair_of_floats(in, words[2 * h + 1], 1));
}
template <class In>
__device__ __forceinline__ uint4 operand_a(In in, W4, const unsigned (&words)[2], int h) {
  return make_uint4(pair_of_half_bytes(in, words[h], 0), pair_of_half_bytes(in, words[h], 1),
                    pair_of_half_bytes(in, words[h], 2), pair_of_half_bytes(in, words[h], 3));
}

// Two 16-bit floats times a scale.
template <class Out>
__device__ __forceinline__ unsigned scaled(Out, unsigned pair, float scale) {
  const float low = to_float(Out(), static_cast<unsigned short>(pair & 0xffff));
  const float high = to_float(Out(), static_cast<unsigned short>(pair >> 16));
  return from_float(Out(), low * scale) | static_cast<unsigned>(from_float(Out(), high * scale)) << 16;
}

// The type that weights of type T are multiplied in, by x that becomes y of type Out.
template <class T, class Out>
struct ProductOf {
  using Type = T;
};
template <class Out>
struct ProductOf<W8, Out> {
  using Type = Out;
};
template <class Out>
struct ProductOf<F8, Out> {
  using Type = Out;
};
template <class Out>
struct ProductOf<W4, Out> {
  using Type = Out;
};

}  // namespace cast24
