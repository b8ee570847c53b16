// How a lane's part of a step of the weight lies in memory, and how it becomes operand A.
#pragma once

namespace cast24 {

// kXBytes: of an element of x; kSteps: of the weight, that 128 bytes of x meet; kWords: of kept values of a lane and step;
// kGroups: sums are multiplied by scales of groups of columns while they are made.
template <class T>
struct Traits;
template <>
struct Traits<Bf16> {
  using Sum = float;
  static constexpr int kXBytes = 2, kSteps = 1, kWords = 8;
  static constexpr bool kGroups = false;
};
template <>
struct Traits<Fp16> : Traits<Bf16> {};
template <>
struct Traits<W8> {
  using Sum = float;
  static constexpr int kXBytes = 2, kSteps = 1, kWords = 4;
  static constexpr bool kGroups = true;
};
template <>
struct Traits<F8> : Traits<W8> {};
template <>
struct Traits<W4> : Traits<W8> {
  static constexpr int kWords = 2;
};
// The bytes of W8 and of F8, multiplied by x in 8 bits. kOffset: they are 128 too large.
template <>
struct Traits<S8> {
  using Sum = int;
  static constexpr int kXBytes = 1, kSteps = 2, kWords = 4;
  static constexpr bool kGroups = false, kOffset = true;
};
template <>
struct Traits<E4m3> {
  using Sum = float;
  static constexpr int kXBytes = 1, kSteps = 2, kWords = 4;
  static constexpr bool kGroups = false, kOffset = false;
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

// Operand A of a whole step for products in 8 bits. Of the 16 groups of four columns a lane has those of two tiles, t,
// t + 4, t + 8 and t + 12; there they must be 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, so these are the places of x's groups, too:
// `in_8_bits`.
template <class T>
__device__ __forceinline__ uint4 operand_of_step(T, const unsigned (&words)[4]) {
  constexpr unsigned kSign = Traits<T>::kOffset ? 0x80808080 : 0;
  return make_uint4(bytes_of(words[0], words[1], 0x5410) ^ kSign, bytes_of(words[0], words[1], 0x7632) ^ kSign,
                    bytes_of(words[2], words[3], 0x5410) ^ kSign, bytes_of(words[2], words[3], 0x7632) ^ kSign);
}

// Its metadata: lane q of four has that of groups 4 q to 4 q + 3 in rows g and g + 8, and shall have that of half a step,
// the groups in their new order, in row g (even lanes) or g + 8.
__device__ __forceinline__ unsigned metadata_of_step(unsigned e, int lane) {
  const unsigned other = of_neighbour(e);
  const unsigned halves = lane % 2 == 0 ? bytes_of(e, other, 0x5140) : bytes_of(other, e, 0x7362);
  const unsigned swapped = (halves ^ halves >> 4) & 0x00f000f0;  // the inner two of four half bytes
  return halves ^ swapped ^ swapped << 4;
}

// Where column k of x, a multiple of four, stands among those of its row for products in 8 bits.
__device__ __forceinline__ int in_8_bits(int k) {
  const int group = k / 4 % 8;
  return k - 4 * group + 4 * (2 * (group % 4) + group / 4);
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
