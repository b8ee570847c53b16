// What clusters of blocks share, barriers that count bytes, the tensor memory accelerator and wgmma.sp, for `emulation.h`.
// Takes hopper.cuh's place. Boxes arrive in random order at random times; a warpgroup's products are made at once or only
// when they are waited for, by chance: a buffer that is filled too early, or read too late, shows in the result.
//
// Descriptors, swizzling and the layout of D follow the PTX ISA, sections 9.7.15.5.1 and 9.7.15.6.2.1 and .3.
#pragma once

#include <map>

#include "emulation.h"

#define __cluster_dims__(...)
#define __grid_constant__

namespace cast24 {

// As tensor_map.py describes it; the driver encodes that for the GPU.
struct TensorMap {
  const unsigned char* data;
  int64_t itemsize, columns, rows, stride;  // stride: bytes from row to row
  int64_t box_columns, box_rows;
  int64_t unused[9];
};
static_assert(sizeof(TensorMap) == 128);

struct Barrier {
  uint64_t state;
};

}  // namespace cast24

namespace emulation {

struct Phases {
  int arrivals, left;
  int64_t bytes;  // on their way
  unsigned ended;
  void settle() {
    if (left > 0 || bytes != 0) return;
    left = arrivals;
    ++ended;
  }
};
// A box on its way to one block.
struct Box {
  int to_block;
  unsigned char* to;
  const cast24::TensorMap* map;
  int column, row;
  cast24::Barrier* barrier;
};
struct Product {
  void* sums;
  int rows;  // of x
  unsigned long long b;
  float A[16][64];
  void (*make)(const Product&);
};

inline size_t shared_bytes;                            // of each block
inline std::vector<std::vector<unsigned char>> shared;  // of each block, with room to align
inline std::map<const void*, Phases> barriers;
inline std::vector<Box> boxes;
inline std::vector<std::vector<Product>> products;  // of each fiber
inline bool products_are_late;
inline Meeting of_cluster;

inline unsigned char* shared_of(int block) {
  auto address = reinterpret_cast<uintptr_t>(shared[block].data());
  return reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
}
inline int this_block() { return self / threads_in_block; }
inline size_t offset_of(const void* p) {
  const size_t offset = static_cast<const unsigned char*>(p) - shared_of(this_block());
  if (offset >= shared_bytes) fail("an address outside of the block's shared memory");
  return offset;
}
// What is at the same place in another block of the cluster.
template <class T>
T* in_block(T* p, int block) {
  return reinterpret_cast<T*>(shared_of(block) + offset_of(p));
}
inline bool has_ended(int block) {
  for (int t = 0; t < threads_in_block; ++t)
    if (!fibers[block * threads_in_block + t].done) return false;
  return true;
}
inline Phases& phases_of(const void* barrier) {
  auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("a barrier that nobody has made");
  return found->second;
}

inline void begin_cluster(int blocks, int threads, size_t bytes, std::mt19937& random) {
  shared_bytes = bytes;
  shared.assign(blocks, std::vector<unsigned char>(bytes + 1024, 0xff));  // NaNs
  barriers.clear();
  boxes.clear();
  products.assign(static_cast<size_t>(blocks) * threads, {});
  products_are_late = random() % 2;
  of_cluster = {};
}

// Some of the boxes arrive.
inline void deliver(std::mt19937& random) {
  std::shuffle(boxes.begin(), boxes.end(), random);
  for (size_t left = random() % (boxes.size() + 1); left > 0; --left) {
    const Box box = boxes.back();
    boxes.pop_back();
    if (has_ended(box.to_block)) fail("a box for a block that has ended");
    const cast24::TensorMap& map = *box.map;
    for (int64_t i = 0; i < map.box_rows; ++i)
      for (int64_t byte = 0; byte < map.itemsize * map.box_columns; ++byte) {
        const int64_t row = box.row + i, from = box.column * map.itemsize + byte;
        size_t at = box.to - shared_of(box.to_block) + i * 128 + byte;
        at ^= (at >> 7 & 7) << 4;
        const bool is_there = row < map.rows && from < map.columns * map.itemsize;
        shared_of(box.to_block)[at] = is_there ? map.data[row * map.stride + from] : 0;
      }
    Phases& phases = phases_of(box.barrier);
    phases.bytes -= map.itemsize * map.box_columns * map.box_rows;
    phases.settle();
  }
}

}  // namespace emulation

namespace cast24 {

inline unsigned char* dynamic_shared() { return emulation::shared_of(emulation::this_block()); }
inline unsigned rank_in_cluster() { return emulation::this_block(); }
inline void meet_cluster() { emulation::of_cluster.meet(static_cast<int>(emulation::fibers.size())); }

inline void init(Barrier* barrier, unsigned arrivals) {
  emulation::offset_of(barrier);
  const int count = static_cast<int>(arrivals);
  emulation::barriers[barrier] = {count, count, 0, 0};
}
inline void publish_barriers() {}
inline void arrive(const Barrier* barrier, unsigned bytes) {
  emulation::Phases& phases = emulation::phases_of(barrier);
  if (phases.left == 0) emulation::fail("more arrivals than a barrier was made for");
  phases.bytes += bytes;
  --phases.left;
  phases.settle();
}
inline void expect(Barrier* barrier, unsigned bytes) { arrive(barrier, bytes); }
inline void arrive_at(Barrier* barrier, unsigned rank) {
  if (emulation::has_ended(rank)) emulation::fail("an arrival at a block that has ended");
  arrive(emulation::in_block(barrier, rank), 0);
}
inline void wait(Barrier* barrier, unsigned parity) {
  for (int turn = 0; emulation::phases_of(barrier).ended % 2 == parity; ++turn) {
    if (turn == 20000) emulation::fail("waits in vain");
    emulation::yield();
  }
}

template <int kCluster>
void copy_box(void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
  if (emulation::shared.size() != kCluster) emulation::fail("a cluster of another size");
  if (emulation::offset_of(to) % 1024 || map.itemsize * map.box_columns != 128) emulation::fail("a box that swizzling does not fit");
  if (emulation::offset_of(to) + map.box_rows * 128 > emulation::shared_bytes) emulation::fail("a box too large");
  for (int64_t i = row; i < std::min<int64_t>(map.rows, row + map.box_rows); ++i)
    for (int64_t k = column; k < std::min<int64_t>(map.columns, column + map.box_columns); k += 16 / map.itemsize)
      emulation::read(map.data + i * map.stride + map.itemsize * k, 16);
  for (int block = 0; block < kCluster; ++block)
    emulation::boxes.push_back({block, emulation::in_block(static_cast<unsigned char*>(to), block), &map, column, row,
                                emulation::in_block(barrier, block)});
}

inline unsigned long long operand_b(const unsigned char* p) {
  return emulation::offset_of(p) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
template <int kRegisters>
void shrink_to() {}
template <int kRegisters>
void grow_to() {}

inline void begin_products() {}
inline void end_products() {}
template <int kLeft>
void wait_for_products() {
  if (emulation::products_are_late)
    for (int turn = 0; turn < 8; ++turn) emulation::yield();  // long enough for a buffer to be filled again
  auto& waiting = emulation::products[emulation::self];
  while (waiting.size() > 2 * kLeft) {
    waiting.front().make(waiting.front());
    waiting.erase(waiting.begin());
  }
}

// The lane's part of D, from what shared memory holds now.
template <class T, class Sum>
void make_product(const emulation::Product& product) {
  constexpr int K = kIn8Bits<T> ? 64 : 32;
  Sum* const sums = static_cast<Sum*>(product.sums);
  const size_t start = (product.b & 0x3fff) << 4, of_8_rows = (product.b >> 32 & 0x3fff) << 4;
  if (product.b >> 62 != 1 || (product.b >> 49 & 7) != 0) emulation::fail("a layout of B that is not emulated");
  const unsigned char* shared = emulation::shared_of(emulation::this_block());
  const int lane = threadIdx.x % 32, group = lane >> 2, thread = lane % 4;
  for (int i = 0; i < product.rows / 2; ++i) {
    const int row = i % 4 < 2 ? group : group + 8, column = i / 4 * 8 + thread * 2 + i % 2;
    double sum = sums[i];
    for (int k = 0; k < K; ++k) {
      size_t at = start + column / 8 * of_8_rows + column % 8 * 128 + 64 / K * k;
      at ^= (at >> 7 & 7) << 4;
      std::conditional_t<kIn8Bits<T>, unsigned char, unsigned short> bits;
      std::memcpy(&bits, shared + at, sizeof bits);
      sum += static_cast<double>(product.A[row][k]) * to_float(T(), bits);
    }
    sums[i] = static_cast<Sum>(sum);
  }
}

template <int kSelector, class T, class Sum, int kSums>
void begin_mma_sp(T type, Sum (&d)[kSums], const uint4& a, unsigned long long b, unsigned e) {
  emulation::Registers& warp = emulation::exchange([&](emulation::Registers& registers, int lane) {
    registers.a[lane] = a;
    registers.b[lane] = {};
    registers.e[lane] = e;
  });
  if (!warp.assembled) assemble<kSelector>(type, warp);
  emulation::Product product{d, 2 * kSums, b, {}, make_product<T, Sum>};
  std::memcpy(product.A, warp.A, sizeof product.A);
  emulation::products[emulation::self].push_back(product);
  if (!emulation::products_are_late) wait_for_products<0>();
}

}  // namespace cast24
