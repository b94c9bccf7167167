#pragma once

#include <algorithm>
#include <vector>

#include "../selection.h"
#include "common.h"
#include "pair_blocks.h"

namespace facelt::cpu {

// The work of all classes' pairs, split by blocks of rows so that threads share a large class.
// Each task keeps its own k largest candidates; a class's are merged in a fixed order.
template <class T>
class RangeTasks {
 public:
  using A = Compute<T>;

  RangeTasks(const T* features, std::int64_t dimensions, const std::int64_t* order,
             const std::int64_t* offsets, std::int64_t batch, std::int64_t classes, std::int64_t k)
      : features_(features),
        dimensions_(dimensions),
        order_(order),
        offsets_(offsets),
        batch_(batch),
        k_(static_cast<std::size_t>(k)) {
    for (std::int64_t s = 0; s < classes; ++s) {
      first_task_.push_back(size());
      const std::int64_t members = offsets[s + 1] - offsets[s];
      if (members < 2) continue;
      for (std::int64_t block = 0; block < number_of_blocks(members); ++block) {
        tasks_.push_back({s, block, {}});
      }
    }
    first_task_.push_back(size());
  }

  std::int64_t size() const { return static_cast<std::int64_t>(tasks_.size()); }

  void run(std::int64_t number) {
    Task& task = tasks_[number];
    // A heap with the smallest candidate kept on top: what a new one has to beat.
    std::vector<Candidate<A>>& kept = task.candidates;
    kept.reserve(std::min<std::size_t>(k_, kBlockRows));
    const auto offer = [&](std::int64_t a, std::int64_t b, A distance) {
      const Candidate<A> candidate{distance, a * batch_ + b};
      if (kept.size() == k_) {
        if (!is_larger(candidate, kept.front())) return;
        std::pop_heap(kept.begin(), kept.end(), is_larger<A>);
        kept.back() = candidate;
      } else {
        kept.push_back(candidate);
      }
      std::push_heap(kept.begin(), kept.end(), is_larger<A>);
    };
    visit_pair_block(features_, dimensions_, order_, offsets_[task.segment],
                     offsets_[task.segment + 1], task.block, offer);
  }

  // The class's min(k, pairs) largest candidates, largest first; a pair is a * batch + b of sorted
  // positions. To be called after all tasks have run.
  std::vector<Candidate<A>> largest(std::int64_t segment) const {
    std::vector<Candidate<A>> merged;
    for (std::int64_t t = first_task_[segment]; t < first_task_[segment + 1]; ++t) {
      merged.insert(merged.end(), tasks_[t].candidates.begin(), tasks_[t].candidates.end());
    }
    const std::size_t number = std::min(k_, merged.size());
    std::partial_sort(merged.begin(), merged.begin() + number, merged.end(), is_larger<A>);
    merged.resize(number);
    return merged;
  }

 private:
  struct Task {
    std::int64_t segment;
    std::int64_t block;
    std::vector<Candidate<A>> candidates;
  };

  const T* features_;
  std::int64_t dimensions_;
  const std::int64_t* order_;
  const std::int64_t* offsets_;
  std::int64_t batch_;
  std::size_t k_;
  std::vector<Task> tasks_;
  std::vector<std::int64_t> first_task_;
};

// Writes the class's ranges (distances, not their squares, unless squared) and pairs of samples,
// filled up to k with 0 and kNoPair.
template <class A>
void write_ranges(const std::vector<Candidate<A>>& largest, const std::int64_t* order,
                  std::int64_t batch, std::int64_t k, bool squared, A* ranges,
                  std::int64_t* pairs) {
  const std::int64_t number = static_cast<std::int64_t>(largest.size());
  for (std::int64_t j = 0; j < k; ++j) {
    const bool selected = j < number;
    ranges[j] = !selected ? A(0) : squared ? largest[j].distance : square_root(largest[j].distance);
    pairs[2 * j] = selected ? order[largest[j].pair / batch] : kNoPair;
    pairs[2 * j + 1] = selected ? order[largest[j].pair % batch] : kNoPair;
  }
}

// grad[i] = what start(i, row) writes + sum over the pairs (i, o) of i's class of
// factor * pair_scale * (x_i - x_o). A segment of -1 or beyond `rows` has no pairs.
template <class T, class Start>
void write_pair_gradients(const T* features, std::int64_t batch, std::int64_t dimensions,
                          const std::int64_t* segment, const std::int64_t* pairs,
                          const Compute<T>* pair_scale, std::int64_t rows, std::int64_t k,
                          Compute<T> factor, T* grad, int num_threads, const Start& start) {
  using A = Compute<T>;
  constexpr bool kWide = std::is_same_v<T, A>;
  const RowKernels<A>& kernels = row_kernels<A>();
  std::vector<A> scratch(kWide ? 0 : 3 * dimensions * num_threads);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (std::int64_t i = 0; i < batch; ++i) {
    A* const buffer = scratch.data() + (kWide ? 0 : 3 * dimensions * omp_get_thread_num());
    A* sum;
    if constexpr (kWide) {
      sum = grad + i * dimensions;
    } else {
      sum = buffer;
    }
    start(i, sum);
    const std::int64_t s = segment[i];
    const bool has_pairs = s >= 0 && s < rows;
    for (std::int64_t j = s * k; has_pairs && j < (s + 1) * k; ++j) {
      if (pairs[2 * j] != i && pairs[2 * j + 1] != i) continue;
      const std::int64_t other = pairs[2 * j] == i ? pairs[2 * j + 1] : pairs[2 * j];
      const T* x = features + i * dimensions;
      const T* y = features + other * dimensions;
      const A scale = factor * pair_scale[j];
      if constexpr (kWide) {
        kernels.add_scaled_difference(x, y, scale, sum, dimensions);
      } else {
        conversion_kernels<T>().widen(x, buffer + dimensions, dimensions);
        conversion_kernels<T>().widen(y, buffer + 2 * dimensions, dimensions);
        kernels.add_scaled_difference(buffer + dimensions, buffer + 2 * dimensions, scale, sum,
                                      dimensions);
      }
    }
    if constexpr (!kWide) conversion_kernels<T>().narrow(sum, grad + i * dimensions, dimensions);
  }
}

}  // namespace facelt::cpu
