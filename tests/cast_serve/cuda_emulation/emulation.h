// Runs CUDA kernels of one block shape on the CPU: every thread is a fiber, and the fibers of a block, or of a cluster of
// blocks, take turns at each __syncthreads() and each instruction of a whole warp, in random order, so that a missing barrier
// shows. Asynchronous copies are made at once or as late as they may be, by chance. Takes tensor_core.cuh's place.
//
// mma.sp follows the tables of the PTX ISA, sections 9.7.14.6.1 (storage), .2.2 (m16n8k32, 16-bit types) and .2.6
// (m16n8k64, 8-bit types), and knows nothing of how the weight was packed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct Dim {
  int x, y, z;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
using std::min;

static Dim threadIdx, blockIdx, gridDim;

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %d %d %d, thread %d)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x);
  std::abort();
}

// Memory that kernels may read, and how often each of its bytes was read.
struct Region {
  const unsigned char* data;
  size_t bytes;
  unsigned char* reads;
};
inline std::vector<Region> regions;
inline bool checked;

inline void read(const void* p, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned load");
  for (Region& region : regions)
    if (at >= region.data && at + bytes <= region.data + region.bytes) {
      for (size_t i = 0; i < bytes; ++i) ++region.reads[at - region.data + i];
      return;
    }
  if (checked) fail("load outside of every argument");
}

struct Copy {
  uint4* to;
  uint4 value;
};
struct Fiber {
  ucontext_t context;
  std::deque<std::vector<Copy>> copies;  // groups under way, the last one still open
  std::vector<char> stack = std::vector<char>(96 << 10);
  bool done;
};
inline std::vector<Fiber> fibers;  // of all threads of all blocks that run, one block after the other
inline int self, threads_in_block;  // the fiber that runs
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void yield() {
  const int mine = self;
  swapcontext(&fibers[mine].context, &scheduler);
}

inline void entry() {
  body();
  fibers[self].done = true;
  swapcontext(&fibers[self].context, &scheduler);
}

// Of several fibers.
struct Meeting {
  int arrived;
  unsigned generation;
  void meet(int all) {
    const unsigned mine = generation;
    if (++arrived == all) {
      arrived = 0;
      ++generation;
    }
    while (generation == mine) yield();
  }
};
inline std::vector<Meeting> of_blocks;

// One warp's registers at an instruction that all its lanes make together; the next one uses the other half, as lanes are
// at most one apart.
struct Registers {
  uint4 a[32], b[32];
  unsigned e[32];
  const uint4* row[32];
  float A[16][64], B[64][8];  // what the fragments hold, once a lane has put that together
  bool assembled;
};
struct Exchange {
  Registers half[2];
  unsigned count[32];
};
inline std::vector<Exchange> warps;
inline bool copies_are_late;

// Leaves this lane's registers, and returns those of the warp once all lanes are here.
template <class Leave>
Registers& exchange(Leave leave) {
  const int lane = threadIdx.x % 32;
  Exchange& warp = warps[self / 32];
  const unsigned turn = warp.count[lane]++;
  warp.half[turn % 2].assembled = false;
  leave(warp.half[turn % 2], lane);
  while (*std::min_element(warp.count, warp.count + 32) <= turn) yield();
  return warp.half[turn % 2];
}

// Runs these blocks side by side, some faster than others; `between` is called before each turn of all fibers.
inline void run_blocks(const std::vector<Dim>& blocks, int threads, std::mt19937& random,
                       const std::function<void()>& between) {
  const int all = threads * static_cast<int>(blocks.size());
  threads_in_block = threads;
  fibers.resize(all);
  warps.assign(all / 32, Exchange{});
  of_blocks.assign(blocks.size(), Meeting{});
  copies_are_late = random() % 2;
  std::vector<int> order(all);
  for (int t = 0; t < all; ++t) {
    order[t] = t;
    Fiber& fiber = fibers[t];
    fiber.done = false;
    fiber.copies.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  std::shuffle(order.begin(), order.end(), random);
  std::vector<bool> waits(blocks.size());
  for (int left = all; left > 0;) {
    between();
    for (size_t block = 1; block < blocks.size(); ++block) waits[block] = random() % (2 * block) != 0;
    for (int t : order) {
      if (fibers[t].done || waits[t / threads]) continue;
      self = t;
      threadIdx.x = t % threads;
      blockIdx = blocks[t / threads];
      swapcontext(&scheduler, &fibers[t].context);
      left -= fibers[t].done;
    }
  }
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::of_blocks[emulation::self / emulation::threads_in_block].meet(emulation::threads_in_block);
}

namespace cast24 {

struct Bf16 {};
struct Fp16 {};
struct E4m3 {};
struct S8 {};
struct W8 {};
struct F8 {};
struct W4 {};
template <class T>
constexpr bool kIn8Bits = std::is_same_v<T, S8> || std::is_same_v<T, E4m3>;

inline uint4 load_once(const uint4* p) {
  emulation::read(p, 16);
  return *p;
}
inline uint2 load_once(const uint2* p) {
  emulation::read(p, 8);
  return *p;
}
inline unsigned load_once(const unsigned* p) {
  emulation::read(p, 4);
  return *p;
}
inline uint4 load(const uint4* p) {
  emulation::read(p, 16);
  return *p;
}
inline unsigned load(const unsigned* p) {
  emulation::read(p, 4);
  return *p;
}
inline float load(const float* p) {
  emulation::read(p, 4);
  return *p;
}
inline uint2 load(const uint2* p) {
  emulation::read(p, 8);
  return *p;
}
inline uint4 load_shared_by_blocks(const uint4* p) { return *p; }

inline void copy_async(uint4* to, const unsigned char* from, bool there) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulation::fail("misaligned copy");
  const uint4 value = there ? load(reinterpret_cast<const uint4*>(from)) : uint4{};
  if (emulation::copies_are_late)
    emulation::fibers[emulation::self].copies.back().push_back({to, value});
  else
    *to = value;
}
inline void end_copies() { emulation::fibers[emulation::self].copies.emplace_back(); }
template <int kLeft>
void wait_for_copies() {
  auto& groups = emulation::fibers[emulation::self].copies;
  for (; groups.size() > kLeft + 1; groups.pop_front())
    for (const emulation::Copy& copy : groups.front()) *copy.to = copy.value;
}

inline uint4 load_matrices(const uint4* row) {
  const emulation::Registers& warp =
      emulation::exchange([&](emulation::Registers& registers, int lane) { registers.row[lane] = row; });
  const int lane = threadIdx.x % 32;
  unsigned words[4];
  for (int i = 0; i < 4; ++i)
    words[i] = reinterpret_cast<const unsigned*>(warp.row[8 * i + lane / 4])[lane % 4];
  return {words[0], words[1], words[2], words[3]};
}

inline unsigned transposed(unsigned pair) {
  const emulation::Registers& warp =
      emulation::exchange([&](emulation::Registers& registers, int lane) { registers.e[lane] = pair; });
  const int lane = threadIdx.x % 32;
  auto value = [&](int row, int column) { return warp.e[4 * row + column / 2] >> column % 2 * 16 & 0xffff; };
  return value(2 * (lane % 4), lane / 4) | value(2 * (lane % 4) + 1, lane / 4) << 16;
}

inline unsigned of_neighbour(unsigned word) {
  const emulation::Registers& warp =
      emulation::exchange([&](emulation::Registers& registers, int lane) { registers.e[lane] = word; });
  return warp.e[threadIdx.x % 32 ^ 1];
}

inline void let_next_begin() {}
inline void wait_for_previous() {}

inline bool last_to_arrive(unsigned* counter, unsigned blocks, unsigned* last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    *last = *counter == blocks - 1;
    *counter = *last ? 0 : *counter + 1;
  }
  __syncthreads();
  return *last;
}

inline float to_float(Bf16, unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
inline float to_float(Fp16, unsigned short bits) {
  _Float16 v;
  std::memcpy(&v, &bits, 2);
  return static_cast<float>(v);
}
inline unsigned short from_float(Bf16, float v) {
  const unsigned bits = __float_as_uint(v);
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest even; no NaN here
}
inline unsigned short from_float(Fp16, float v) {
  const _Float16 half = static_cast<_Float16>(v);
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float to_float(S8, unsigned char bits) { return static_cast<signed char>(bits); }
inline float to_float(E4m3, unsigned char bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float v = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(static_cast<float>(mantissa), -9);
  return bits & 128 ? -v : v;
}

inline unsigned bytes_of(unsigned x, unsigned y, unsigned digits) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= static_cast<unsigned>(both >> 8 * (digits >> 4 * i & 7) & 255) << 8 * i;
  return chosen;
}
template <class T>
unsigned pair_of(T type, float low, float high) {
  return from_float(type, low) | static_cast<unsigned>(from_float(type, high)) << 16;
}
template <class T>
unsigned difference(T type, unsigned a, unsigned b) {
  auto half = [&](unsigned word, int i) { return to_float(type, static_cast<unsigned short>(word >> 16 * i)); };
  return pair_of(type, half(a, 0) - half(b, 0), half(a, 1) - half(b, 1));
}

template <class T>
unsigned product(T type, unsigned a, unsigned b) {
  auto half = [&](unsigned word, int i) { return to_float(type, static_cast<unsigned short>(word >> 16 * i)); };
  return pair_of(type, half(a, 0) * half(b, 0), half(a, 1) * half(b, 1));
}

inline float magnitude(float v) { return std::fabs(v); }
template <class T>
constexpr float kLargest = 127.0f;
template <>
constexpr float kLargest<E4m3> = 448.0f;
inline unsigned char to_8_bits(S8, float v) { return static_cast<unsigned char>(static_cast<int>(std::nearbyint(v))); }
inline unsigned char to_8_bits(E4m3 type, float v) {  // the nearest, of two the even one; 127 and 255 are no numbers
  int nearest = 0;
  for (int code = 1; code < 255; ++code) {
    if (code == 127) continue;
    const float error = std::fabs(to_float(type, code) - v), least = std::fabs(to_float(type, nearest) - v);
    if (error < least || (error == least && code % 2 == 0)) nearest = code;
  }
  return static_cast<unsigned char>(nearest);
}
template <class T>
unsigned short to_8_bits(T type, float low, float high) {
  return static_cast<unsigned short>(to_8_bits(type, low) | to_8_bits(type, high) << 8);
}

inline unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Element i of a lane's fragment, elements of kBits each, the first in the low bits of the first register.
template <class T>
float element(T type, const uint4& fragment, int i) {
  constexpr int per_word = kIn8Bits<T> ? 4 : 2;
  const unsigned bits = word(fragment, i / per_word) >> i % per_word * (32 / per_word);
  if constexpr (per_word == 4)
    return to_float(type, static_cast<unsigned char>(bits));
  else
    return to_float(type, static_cast<unsigned short>(bits));
}

// A and B of a warp's fragments; wgmma has no fragments of B.
template <int kSelector, class T>
void assemble(T type, emulation::Registers& warp) {
  constexpr bool wide = !kIn8Bits<T>;  // 16-bit
  constexpr int elements = wide ? 8 : 16;
  std::memset(warp.A, 0, sizeof warp.A);
  for (int l = 0; l < 32; ++l) {
    const int group = l >> 2, thread = l % 4;  // groupID and threadID_in_group
    for (int i = 0; i < elements; ++i) {
      int row, chunk;  // chunk: first of the 4 columns that this value is one of
      if (wide) {
        row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
        chunk = i < 4 ? thread * 4 : thread * 4 + 16;
      } else {
        row = (i < 4 || (8 <= i && i < 12)) ? group : group + 8;
        chunk = (i < 8 ? thread * 8 : thread * 8 + 32) + i % 4 / 2 * 4;
      }
      // Figures 122, 136 and 137: which lane tells where in row and chunk, and in which of its bits
      const int teller = wide ? 4 * (row % 8) + 2 * kSelector + chunk / 16 : 4 * (row % 8) + row / 8 + 2 * (chunk / 32);
      const int shift = wide ? row / 8 * 16 + chunk % 16 : chunk % 32;
      const unsigned pair = warp.e[teller] >> shift & 15;
      if ((pair & 3) >= pair >> 2) emulation::fail("metadata out of order");
      warp.A[row][chunk + (i % 2 ? pair >> 2 : pair & 3)] = element(type, warp.a[l], i);
      const int k = wide ? thread * 2 + i % 2 + i / 2 * 8 : thread * 4 + i % 4 + i / 4 * 16;
      warp.B[k][group] = element(type, warp.b[l], i);
    }
  }
  warp.assembled = true;
}

template <int kSelector, class T, class Sum>
void mma_sp(T type, Sum (&d)[4], const uint4& a, const uint4& b, unsigned e) {
  constexpr int K = kIn8Bits<T> ? 64 : 32;
  emulation::Registers& warp = emulation::exchange([&](emulation::Registers& registers, int lane) {
    registers.a[lane] = a;
    registers.b[lane] = b;
    registers.e[lane] = e;
  });
  if (!warp.assembled) assemble<kSelector>(type, warp);
  const int lane = threadIdx.x % 32, group = lane >> 2, thread = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = thread * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < K; ++k) sum += static_cast<double>(warp.A[row][k]) * warp.B[k][column];
    d[i] = static_cast<Sum>(sum);
  }
}

}  // namespace cast24
