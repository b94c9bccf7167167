// The shared memory of the block that runs.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "runtime.h"

namespace facelt::emulation {

/// Between the arrays lie guards that nobody may write to.
class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  /// Begins a block, with no array.
  void clear();
  /// The array of that identity; null if the block has none yet.
  void* find(const void* identity) const;
  /// A poisoned array, aligned to `alignment` and no better. Null if there is no room.
  void* allocate(const void* identity, const SharedSite& site, std::size_t bytes,
                 std::size_t alignment);
  /// Throws if a guard was written to; `where` ends the message.
  void check_guards(const std::string& where);

 private:
  struct Array {
    const void* identity;
    SharedSite site;
    unsigned char* data;
    std::size_t bytes;
  };

  void check_guard(const Array& array, const unsigned char* guard, const std::string& where) const;

  std::unique_ptr<unsigned char[]> arena_;
  std::size_t used_ = 0;
  std::vector<Array> arrays_;
};

}  // namespace facelt::emulation
