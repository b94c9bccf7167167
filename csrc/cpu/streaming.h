// Rows on their way between memory and the processor, where a table is larger than the caches.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace facelt::cpu {

// For rows that lie anywhere: the processor foresees only what follows within one.
template <class T>
void prefetch_row(const T* row, std::int64_t n) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  for (std::int64_t d = 0; d < n; d += kLine) __builtin_prefetch(row + d);
}

// Writes the rows of a table. Those of a large one go past the caches: a store through them would
// first read what it overwrites.
template <class T>
class TableWriter {
 public:
  TableWriter(T* table, std::int64_t rows, std::int64_t n)
      : table_(table), n_(n), streamed_(rows * n * std::int64_t(sizeof(T)) >= kStreamedBytes) {
#if defined(__SSE2__)
    streamed_ &= reinterpret_cast<std::uintptr_t>(table) % sizeof(__m128i) == 0 &&
                 n * sizeof(T) % sizeof(__m128i) == 0;
#endif
  }

  void write(std::int64_t i, const T* row) const {
#if defined(__SSE2__)
    if (streamed_) {
      __m128i* target = reinterpret_cast<__m128i*>(table_ + i * n_);
      const __m128i* source = reinterpret_cast<const __m128i*>(row);
      const std::int64_t count = n_ * std::int64_t(sizeof(T)) / std::int64_t(sizeof(__m128i));
      for (std::int64_t d = 0; d < count; ++d) {
        _mm_stream_si128(target + d, _mm_loadu_si128(source + d));
      }
      return;
    }
#endif
    std::memcpy(table_ + i * n_, row, n_ * sizeof(T));
  }

  // By each thread, before another one may read what it wrote.
  void finish() const {
#if defined(__SSE2__)
    if (streamed_) _mm_sfence();
#endif
  }

 private:
  static constexpr std::int64_t kStreamedBytes = 32 << 20;

  T* table_;
  std::int64_t n_;
  bool streamed_;
};

}  // namespace facelt::cpu
