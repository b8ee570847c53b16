// What warpgroup.cuh needs of the machine beyond tensor_core.cuh: clusters of blocks, barriers that also count bytes, copies
// by the tensor memory accelerator, wgmma.sp. Of sm_90a alone; the tests replace this file by one for the CPU.
#pragma once

namespace cast24 {

// Memory [rows, columns] and a box of it, as the driver encodes them.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// In shared memory. It has two phases in turn: one ends when all have arrived that it was made for, and all bytes that they
// expect.
struct Barrier {
  unsigned long long state;
};

// The block's memory of the size that it was launched with, less what is before a multiple of 1024 bytes: at the same
// address in all blocks of a cluster.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ unsigned char all[];
  return all + (-shared_address(all) & 1023);
}

__device__ __forceinline__ unsigned rank_in_cluster() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster; what they wrote before is visible after.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void init(Barrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Barriers that this thread has made may be used by others of the cluster once they have met.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and lets the phase wait for so many bytes.
__device__ __forceinline__ void expect(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrives at the barrier of this address in another block of the cluster, or this one. Orders nothing that this thread has
// written: with the scope of the cluster it would be a fence for the whole GPU in each step, as waiting would be.
__device__ __forceinline__ void arrive_at(Barrier* barrier, unsigned rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Until the phase of this parity, 0 for the first, has ended.
__device__ __forceinline__ void wait(Barrier* barrier, unsigned parity) {
  asm volatile(
      "{\n\t.reg .pred ended;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n\t"
      "@!ended bra again;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The map's box at (column, row) to the same shared memory of all kCluster blocks, chunks of 16 bytes at c ^ (row % 8) of
// its rows of 128 bytes, zeros for what is outside. In each block it counts for the barrier of this address.
template <int kCluster>
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<unsigned short>((1 << kCluster) - 1))
      : "memory");
}

// Operand B of wgmma in shared memory as `copy_box` leaves it, of K major rows of 128 bytes: PTX ISA 9.7.15.5.1.2.2. The
// address is that of the first byte of row 0, at 64-byte steps within its 128; 8 rows are 1024 bytes.
__device__ __forceinline__ unsigned long long operand_b(const unsigned char* p) {
  return (shared_address(p) & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Of all warps of a warpgroup: registers that it gives back, or takes of those given back.
template <int kRegisters>
__device__ __forceinline__ void shrink_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void grow_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product, and after registers that products read or write were written.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products begun since the last call are a group; the other waits until all groups but the last kLeft are made. Until
// then their registers and shared memory are theirs.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Numbers of 10 and of 60 operands, and 8 and 64 operands, of kind "+f" or "+r".
#define CAST24_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define CAST24_60 CAST24_TEN() "," CAST24_TEN(1) "," CAST24_TEN(2) "," CAST24_TEN(3) "," CAST24_TEN(4) "," CAST24_TEN(5)
#define CAST24_8(kind, d, i)                                                                                  \
  kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3]), kind(d[i + 4]), kind(d[i + 5]), kind(d[i + 6]), \
      kind(d[i + 7])
#define CAST24_64(kind, d, i)                                                                           \
  CAST24_8(kind, d, i), CAST24_8(kind, d, i + 8), CAST24_8(kind, d, i + 16), CAST24_8(kind, d, i + 24), \
      CAST24_8(kind, d, i + 32), CAST24_8(kind, d, i + 40), CAST24_8(kind, d, i + 48), CAST24_8(kind, d, i + 56)

// d += A B of a warpgroup, begun: A is 64 rows by 64 bytes of kept values and zeros, 16 rows in each warp as operand A of
// mma_sp, B the same columns of 128 or 256 rows of x. d[4 i + j] of a lane is what mma_sp has in d[j] for rows 8 i to
// 8 i + 7 of x. PTX ISA 9.7.15.6.2.1 and .3; metadata as for mma.sp. `signs`: neither operand is negated, nor, of 16 bits,
// transposed; integers cannot be.
#define CAST24_WGMMA_SP(Type, acc_t, kind, columns, types, signs)                                                        \
  template <int kSelector>                                                                                               \
  __device__ __forceinline__ void begin_mma_sp(Type, acc_t(&d)[64], const uint4& a, unsigned long long b, unsigned e) {  \
    asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; "                                                             \
                 "wgmma.mma_async.sp.sync.aligned.m64n128" columns "." types " {" CAST24_60                              \
                 ",%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, %69, %70, add" signs "; }"                                  \
                 : CAST24_64(kind, d, 0)                                                                                 \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(e), "n"(kSelector));                              \
  }                                                                                                                      \
  template <int kSelector>                                                                                               \
  __device__ __forceinline__ void begin_mma_sp(Type, acc_t(&d)[128], const uint4& a, unsigned long long b, unsigned e) { \
    asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; "                                                             \
                 "wgmma.mma_async.sp.sync.aligned.m64n256" columns "." types " {" CAST24_60 "," CAST24_TEN(6)            \
                 "," CAST24_TEN(7) "," CAST24_TEN(8) "," CAST24_TEN(9) "," CAST24_TEN(10) "," CAST24_TEN(11)             \
                 ",%120,%121,%122,%123,%124,%125,%126,%127}, {%128,%129,%130,%131}, %132, %133, %134, add" signs "; }"   \
                 : CAST24_64(kind, d, 0), CAST24_64(kind, d, 64)                                                         \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(e), "n"(kSelector));                              \
  }
CAST24_WGMMA_SP(Bf16, float, "+f", "k32", "f32.bf16.bf16", ", 1, 1, 0")
CAST24_WGMMA_SP(Fp16, float, "+f", "k32", "f32.f16.f16", ", 1, 1, 0")
CAST24_WGMMA_SP(E4m3, float, "+f", "k64", "f32.e4m3.e4m3", ", 1, 1")
CAST24_WGMMA_SP(S8, int, "+r", "k64", "s32.s8.s8", "")
#undef CAST24_WGMMA_SP
#undef CAST24_60
#undef CAST24_64
#undef CAST24_8
#undef CAST24_TEN

}  // namespace cast24
