#include "shared_memory.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "fiber.h"

namespace facelt::emulation {
namespace {

// NaN to a float, -1 to an int.
constexpr unsigned char kPoison = 0xff;
constexpr std::size_t kGuardBytes = 1024;
constexpr std::size_t kArenaBytes = std::size_t{1} << 20;

/// Differs from the poison, and is NaN too: a read past the end must not look like a number.
constexpr auto kGuard = [] {
  std::array<unsigned char, kGuardBytes + 1> bytes{};
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = i % 2 == 0 ? 0xf5 : 0xff;
  return bytes;
}();

/// What a guard at this address holds: its pattern follows the address, not the array.
const unsigned char* guard_pattern(const unsigned char* guard) {
  return kGuard.data() + reinterpret_cast<std::uintptr_t>(guard) % 2;
}

/// The distance to an address that is a multiple of `alignment`, but not of twice as much.
std::size_t padding(const unsigned char* address, std::size_t alignment) {
  const std::size_t past = reinterpret_cast<std::uintptr_t>(address) % (2 * alignment);
  return (3 * alignment - past) % (2 * alignment);
}

}  // namespace

SharedMemory::SharedMemory() : arena_(new unsigned char[kArenaBytes]) {
  poison(arena_.get(), kArenaBytes);
}

SharedMemory::~SharedMemory() { unpoison(arena_.get(), kArenaBytes); }

void SharedMemory::clear() {
  poison(arena_.get(), used_);
  used_ = 0;
  arrays_.clear();
}

void* SharedMemory::find(const void* identity) const {
  for (const Array& array : arrays_) {
    if (array.identity == identity) return array.data;
  }
  return nullptr;
}

void* SharedMemory::allocate(const void* identity, const SharedSite& site, std::size_t bytes,
                             std::size_t alignment) {
  // AddressSanitizer can only poison what lies before an array if the array begins at 8 bytes.
  if (kAddressSanitizer) alignment = std::max<std::size_t>(alignment, 8);
  unsigned char* const front = arena_.get() + used_;
  unsigned char* const data = front + kGuardBytes + padding(front + kGuardBytes, alignment);
  unsigned char* const end = data + bytes + kGuardBytes;
  if (end > arena_.get() + kArenaBytes) return nullptr;
  used_ = static_cast<std::size_t>(end - arena_.get());
  arrays_.push_back({identity, site, data, bytes});
  unpoison(front, static_cast<std::size_t>(end - front));
  std::memcpy(data - kGuardBytes, guard_pattern(data - kGuardBytes), kGuardBytes);
  std::memset(data, kPoison, bytes);
  std::memcpy(data + bytes, guard_pattern(data + bytes), kGuardBytes);
  poison(front, static_cast<std::size_t>(data - front));
  poison(data + bytes, kGuardBytes);
  return data;
}

void SharedMemory::check_guards(const std::string& where) {
  unpoison(arena_.get(), used_);
  for (const Array& array : arrays_) {
    check_guard(array, array.data - kGuardBytes, where);
    check_guard(array, array.data + array.bytes, where);
  }
}

void SharedMemory::check_guard(const Array& array, const unsigned char* guard,
                               const std::string& where) const {
  const unsigned char* pattern = guard_pattern(guard);
  if (std::memcmp(guard, pattern, kGuardBytes) == 0) return;
  const auto damaged = std::mismatch(guard, guard + kGuardBytes, pattern).first;
  throw Error(std::string(array.site.site.file) + ":" + std::to_string(array.site.site.line) +
              ": shared array '" + array.site.name + "' of " + std::to_string(array.bytes) +
              " bytes was written out of its bounds, at byte " +
              std::to_string(damaged - array.data) + where);
}

}  // namespace facelt::emulation
