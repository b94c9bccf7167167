#pragma once

#include <algorithm>
#include <vector>

#include "../cluster_margin.h"
#include "rows.h"

namespace facelt::cpu {

// The samples of a block side by side, as HingeBlock wants them.
template <class A>
class BlockHinges {
 public:
  static constexpr std::int64_t kSamples = kHingeSamples;

  BlockHinges(const std::vector<A>& classes, const ClusterMarginOptions& options, A share)
      : classes_(classes),
        ignored_(options.ignored),
        share_(share),
        clusters_(classes.size()),
        terms_(clusters_ * kSamples) {
    block_ = {classes_.data(),
              clusters_,
              static_cast<A>(options.between_margin),
              static_cast<A>(options.within_margin),
              own_cluster_,
              own_class_,
              factors_,
              terms_.data(),
              losses_};
  }

  // The similarity of a block's sample and a cluster; all are to be set before a run.
  A& term(std::int64_t sample, std::int64_t cluster) { return terms_[cluster * kSamples + sample]; }

  // Of `count` samples, from the first of which all pointers are.
  void run(std::int64_t count, const std::int64_t* own, const A* weights, A* gradients, A* losses) {
    for (std::int64_t i = 0; i < count; ++i) {
      const bool ignored = ignored_.marks(own[i]);
      own_cluster_[i] = ignored ? A(0) : static_cast<A>(own[i]);
      own_class_[i] = ignored ? A(0) : classes_[own[i]];
      factors_[i] = weights ? share_ * weights[i] : share_;
    }
    softmax_kernels<A>().hinges(block_);
    for (std::int64_t i = 0; i < count; ++i) {
      if (ignored_.marks(own[i])) {
        losses[i] = A(0);
        std::fill_n(gradients + i * clusters_, clusters_, A(0));
        continue;
      }
      losses[i] = losses_[i];
      for (std::int64_t m = 0; m < clusters_; ++m) gradients[i * clusters_ + m] = term(i, m);
    }
  }

 private:
  const std::vector<A>& classes_;
  IgnoredLabel ignored_;
  A share_;
  std::int64_t clusters_;
  std::vector<A> terms_;
  // Zeros in the places of samples that are ignored or that a last block has not.
  A own_cluster_[kSamples] = {}, own_class_[kSamples] = {}, factors_[kSamples] = {};
  A losses_[kSamples];
  HingeBlock<A> block_;
};

}  // namespace facelt::cpu
