#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../selection.h"
#include "common.h"
#include "pair_blocks.h"

namespace facelt::cpu {

// The mean of one class's samples, added up in batch order.
template <class T>
void write_centroid(const T* features, std::int64_t dimensions, const std::int64_t* order,
                    std::int64_t begin, std::int64_t end, Compute<T>* centroid) {
  using A = Compute<T>;
  const RowKernels<A>& kernels = row_kernels<A>();
  if constexpr (std::is_same_v<T, A>) {
    kernels.sum_rows(features, dimensions, order + begin, end - begin, centroid);
  } else {
    std::fill(centroid, centroid + dimensions, A(0));
    std::vector<A> wide(dimensions);
    for (std::int64_t p = begin; p < end; ++p) {
      conversion_kernels<T>().widen(features + order[p] * dimensions, wide.data(), dimensions);
      kernels.add(wide.data(), centroid, dimensions);
    }
  }
  if (begin == end) return;
  kernels.divide(centroid, static_cast<A>(end - begin), dimensions);
}

// The smallest squared distance among the rows that `live` lists, by blocks that threads can share.
// A candidate's pair is a * number_of_live + b of positions in `live`.
template <class A>
class MinDistance {
 public:
  MinDistance(const A* centroids, std::int64_t dimensions, const std::vector<std::int64_t>& live)
      : centroids_(centroids),
        dimensions_(dimensions),
        live_(live),
        smallest_(number_of_blocks(rows()), Candidate<A>{A(0), kNoPair}),
        finite_(number_of_blocks(rows())) {}

  std::int64_t size() const { return static_cast<std::int64_t>(smallest_.size()); }

  void run(std::int64_t block) {
    Candidate<A>& best = smallest_[block];
    visit_pair_block(centroids_, dimensions_, live_.data(), 0, rows(), block,
                     [&](std::int64_t a, std::int64_t b, A distance) {
                       const Candidate<A> candidate{distance, a * rows() + b};
                       if (is_smaller(candidate, best)) best = candidate;
                     });
    finite_[block] = true;
    for (std::int64_t a = block * kBlockRows; a < std::min((block + 1) * kBlockRows, rows()); ++a) {
      finite_[block] &=
          row_kernels<A>().all_finite(centroids_ + live_[a] * dimensions_, dimensions_);
    }
  }

  struct Result {
    A squared_distance;  // +inf for fewer than two rows, NaN for a centroid that is not finite
    std::int64_t q, r;   // rows, or kNoPair
  };

  Result result() const {
    if (std::find(finite_.begin(), finite_.end(), char{false}) != finite_.end()) {
      return {std::numeric_limits<A>::quiet_NaN(), kNoPair, kNoPair};
    }
    Candidate<A> best{A(0), kNoPair};
    for (const Candidate<A>& candidate : smallest_) {
      if (is_smaller(candidate, best)) best = candidate;
    }
    if (best.pair == kNoPair) return {std::numeric_limits<A>::infinity(), kNoPair, kNoPair};
    return {best.distance, live_[best.pair / rows()], live_[best.pair % rows()]};
  }

 private:
  std::int64_t rows() const { return static_cast<std::int64_t>(live_.size()); }

  const A* centroids_;
  std::int64_t dimensions_;
  const std::vector<std::int64_t>& live_;
  std::vector<Candidate<A>> smallest_;
  std::vector<char> finite_;  // not vector<bool>: threads write neighbouring entries
};

}  // namespace facelt::cpu
