// Constant weights copied out of the mapped model file onto huge pages, one op after the other in a few large pieces of
// memory. A model is read front to back at every token: with the file's 4 kB pages, address translation costs up to a
// quarter of that.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../huge_pages.h"

namespace cast24 {

class ResidentWeights {
 public:
  ResidentWeights() = default;

  // Copies `bytes` bytes and gives up the pages that they were mapped from.
  ResidentWeights(const void* source, size_t bytes) {
    place(bytes);
    if (data_ == nullptr) return;
    std::memcpy(data_, source, bytes);
    unmap_file_pages(source, bytes);
  }

  // The copy, or `otherwise` if there is none.
  const void* or_else(const void* otherwise) const { return data_ ? data_ : otherwise; }

 private:
  static constexpr size_t kChunk = 64 << 20, kAlignment = 64;

  // Memory that lives as long as any weight in it. What is never written takes none.
  struct Chunk {
    char* memory = nullptr;
    size_t size, used = 0;

    explicit Chunk(size_t bytes) : size(bytes) {
#if defined(__linux__)
      void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapped == MAP_FAILED) return;
      memory = static_cast<char*>(mapped);
      advise_huge_pages(memory, size);
#endif
    }
    ~Chunk() {
#if defined(__linux__)
      if (memory != nullptr) munmap(memory, size);
#endif
    }
    Chunk(const Chunk&) = delete;
  };

  // Takes what was read of a mapped file out of this process's memory again; it is constant, so the file still has it.
  // Dropping pages of any other memory would lose them, so the system is asked what this is.
  static void unmap_file_pages(const void* source, size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kPage = 4096;
    const uintptr_t start = (reinterpret_cast<uintptr_t>(source) + kPage - 1) & ~(kPage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(source) + bytes) & ~(kPage - 1);
    std::ifstream maps("/proc/self/maps");
    for (std::string line; start < end && std::getline(maps, line);) {
      unsigned long long first, last, inode;
      if (std::sscanf(line.c_str(), "%llx-%llx %*s %*x %*s %llu", &first, &last, &inode) != 3) continue;
      if (start < first || end > last) continue;
      if (inode != 0) madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED);
      return;
    }
#else
    (void)source, (void)bytes;
#endif
  }

  void place(size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Chunk> filling;
    const std::lock_guard<std::mutex> lock(mutex);
    chunk_ = filling.lock();
    if (chunk_ == nullptr || chunk_->size - chunk_->used < bytes) {
      chunk_ = std::make_shared<Chunk>(bytes > kChunk ? bytes : kChunk);
      if (chunk_->memory == nullptr) return;
      filling = chunk_;
    }
    data_ = chunk_->memory + chunk_->used;
    chunk_->used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (chunk_->used > chunk_->size) chunk_->used = chunk_->size;
  }

  std::shared_ptr<Chunk> chunk_;
  void* data_ = nullptr;
};

}  // namespace cast24
