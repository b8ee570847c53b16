// What the kernels need of the machine: streaming loads, mma.sp, rounding, the arrival of blocks. sm_80 and newer.
// The tests replace this file by one for the CPU and run the kernels' own source there.
#pragma once

namespace cast24 {

struct Bf16 {};
struct Fp16 {};
struct E4m3 {};
struct S8 {};
struct W8 {};  // 8-bit integers, 8-bit floats and 4-bit integers in memory only: 16-bit floats when they are multiplied
struct F8 {};
struct W4 {};

// Read once: kept out of the first-level cache.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ uint2 load_once(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

__device__ __forceinline__ unsigned load_once(const unsigned* p) {
  unsigned v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// What another block wrote: from the second-level cache, which all blocks share.
__device__ __forceinline__ uint4 load_shared_by_blocks(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ uint4 load(const uint4* p) { return *p; }
__device__ __forceinline__ uint2 load(const uint2* p) { return *p; }
__device__ __forceinline__ unsigned load(const unsigned* p) { return *p; }
__device__ __forceinline__ float load(const float* p) { return __ldg(p); }

// 16 bytes from memory to shared memory, or zeros, by the time that `wait_for_copies` says so; both are aligned.
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void copy_async(uint4* to, const unsigned char* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
// The thread's copies since the last call are a group; the other waits until all groups but the last kLeft have arrived.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four matrices of 8 rows of 16 bytes in shared memory; lane 8 i + j says where row j of matrix i is. Word i of lane
// 4 g + t becomes bytes 4 t to 4 t + 3 of row g of matrix i.
__device__ __forceinline__ uint4 load_matrices(const uint4* row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(row))
               : "memory");
  return v;
}

// A matrix of 8 by 8 values of 16 bits, of which lane 4 g + t has those of row g, columns 2 t and 2 t + 1, transposed.
__device__ __forceinline__ unsigned transposed(unsigned pair) {
  unsigned v;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(pair));
  return v;
}

// The word of the other lane of two.
__device__ __forceinline__ unsigned of_neighbour(unsigned word) { return __shfl_xor_sync(~0u, word, 1); }

// d += A B: A is 16 rows by 64 bytes of kept values and zeros, B the same 64 bytes by 8 columns, as PTX ISA 9.7.14.6
// ("mma.sp") lays them out over the lanes. `e` says where the kept values stand; lanes 2 Selector and 2 Selector + 1 of
// every four give it for 16-bit types, all four for 8-bit ones.
#define CAST24_MMA_SP(Type, acc_t, constraint, instruction)                                                    \
  template <int kSelector>                                                                                     \
  __device__ __forceinline__ void mma_sp(Type, acc_t(&d)[4], const uint4& a, const uint4& b, unsigned e) {     \
    asm volatile("mma.sp::ordered_metadata.sync.aligned." instruction                                          \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"        \
                 : constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3])                      \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(e),     \
                   "n"(kSelector));                                                                            \
  }
CAST24_MMA_SP(Bf16, float, "+f", "m16n8k32.row.col.f32.bf16.bf16.f32")
CAST24_MMA_SP(Fp16, float, "+f", "m16n8k32.row.col.f32.f16.f16.f32")
CAST24_MMA_SP(S8, int, "+r", "m16n8k64.row.col.s32.s8.s8.s32")
#if __CUDA_ARCH__ >= 890
CAST24_MMA_SP(E4m3, float, "+f", "m16n8k64.row.col.f32.e4m3.e4m3.f32")
#endif
#undef CAST24_MMA_SP

// 16-bit floats, held as their bits.
__device__ __forceinline__ float to_float(Bf16, unsigned short bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}
__device__ __forceinline__ float to_float(Fp16, unsigned short bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
__device__ __forceinline__ unsigned short from_float(Bf16, float v) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
__device__ __forceinline__ unsigned short from_float(Fp16, float v) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

// Bytes of x (0 to 3) and y (4 to 7), chosen by the four digits of `digits`, the lowest first.
__device__ __forceinline__ unsigned bytes_of(unsigned x, unsigned y, unsigned digits) {
  return __byte_perm(x, y, digits);
}

// Two 16-bit floats in a word: a difference, a product, and two floats rounded.
__device__ __forceinline__ unsigned difference(Bf16, unsigned a, unsigned b) {
  unsigned d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80), "r"(b ^ 0x80008000));  // sub is of sm_90
  return d;
}
__device__ __forceinline__ unsigned difference(Fp16, unsigned a, unsigned b) {
  unsigned d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ unsigned product(Bf16, unsigned a, unsigned b) {
  unsigned d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000));  // mul is of sm_90
  return d;
}
__device__ __forceinline__ unsigned product(Fp16, unsigned a, unsigned b) {
  unsigned d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ unsigned pair_of(Bf16, float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float magnitude(float v) { return fabsf(v); }

// The largest value of an 8-bit type, and two values rounded to it, the first in the low byte; nothing is larger here.
template <class T>
constexpr float kLargest = 127.0f;
template <>
constexpr float kLargest<E4m3> = 448.0f;
__device__ __forceinline__ unsigned short to_8_bits(S8, float low, float high) {
  return static_cast<unsigned short>((__float2int_rn(low) & 255) | (__float2int_rn(high) & 255) << 8);
}
#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ unsigned short to_8_bits(E4m3, float low, float high) {
  unsigned short bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
  return bits;
}
#endif

// Lets the next kernel of the stream begin, as far as it does not wait, if it was launched to overlap.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the stream's earlier kernels have ended and all that they wrote is visible: before the first access to
// anything that they write, or may still read where this kernel writes.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// True in all threads of the block that is the last of `blocks` to call this on `counter`; what the others wrote before
// is then visible to it. The counter is 0 before and after. `last` is in shared memory that the block is done with.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned blocks, unsigned* last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicInc(counter, blocks - 1) == blocks - 1;
  __syncthreads();
  __threadfence();
  return *last;
}

}  // namespace cast24
