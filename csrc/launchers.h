// The three backends have the same functions, so that Python chooses one by name.
#pragma once

#include <cstdint>
#include <optional>

#include "cluster_margin.h"
#include "ignored_label.h"
#include "margin.h"
#include "quintuplets.h"
#include "tensor_view.h"

namespace facelt {

// Where a call runs: a CUDA stream's handle, or the number of CPU threads.
struct Execution {
  std::uintptr_t stream_or_threads;
};

struct RangeLossOptions {
  std::int64_t k;
  double margin;
  double alpha;
  double beta;
  bool squared;
  IgnoredLabel ignored;
};

// The checks that every backend makes of what no pointer shows.
inline void require_ranges(std::int64_t k) {
  if (k < 1) throw std::invalid_argument("k: expected at least 1, got " + std::to_string(k));
}

namespace cpu {
#include "launchers.inc"
}
#if defined(FACELT_WITH_CUDA)
namespace cuda {
#include "launchers.inc"
}
#endif
#if defined(FACELT_WITH_EMULATION)
namespace emulated {
#include "launchers.inc"
}
#endif

}  // namespace facelt
