// Memory for outputs of many megabytes. A fresh one costs more in page faults than in writing it,
// so what a step frees is kept for the next step, which asks for the same sizes; another size frees
// all that is kept.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace facelt::cpu {

class LargeMemory {
 public:
  explicit LargeMemory(std::size_t bytes)
      : size_((bytes + kHugePage - 1) / kHugePage * kHugePage), data_(pool().take(size_)) {}
  ~LargeMemory() { pool().give({size_, data_}); }
  LargeMemory(const LargeMemory&) = delete;
  LargeMemory& operator=(const LargeMemory&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  static constexpr std::size_t kHugePage = 2 << 20;

  struct Block {
    std::size_t size;
    void* data;
  };

  class Pool {
   public:
    void* take(std::size_t size) {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (Block& block : kept_) {
        if (block.size != size) continue;
        void* const data = block.data;
        block = kept_.back();
        kept_.pop_back();
        return data;
      }
      for (const Block& block : kept_) munmap(block.data, block.size);
      kept_.clear();
      return map(size);
    }

    void give(const Block& block) {
      const std::lock_guard<std::mutex> lock(mutex_);
      kept_.push_back(block);
    }

   private:
    // Begins at a huge page: more is mapped than needed, and both ends are given back.
    static void* map(std::size_t size) {
      char* const begin = static_cast<char*>(mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (begin == MAP_FAILED) throw std::bad_alloc();
      const std::size_t head = (kHugePage - reinterpret_cast<std::uintptr_t>(begin)) % kHugePage;
      if (head > 0) munmap(begin, head);
      munmap(begin + head + size, kHugePage - head);
#if defined(MADV_HUGEPAGE)
      madvise(begin + head, size, MADV_HUGEPAGE);
#endif
      return begin + head;
    }

    std::mutex mutex_;
    std::vector<Block> kept_;
  };

  // Never destroyed: tensors may outlive statics.
  static Pool& pool() {
    static Pool* const kPool = new Pool;
    return *kPool;
  }

  std::size_t size_;
  void* data_;
};

}  // namespace facelt::cpu
