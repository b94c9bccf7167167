#include "groups.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common.h"

namespace facelt::cpu {

namespace {

// The samples in batch order, ignored ones last. Returns the number of the others.
std::int64_t put_ignored_last(const std::int64_t* labels, std::int64_t batch, IgnoredLabel ignored,
                              std::int64_t* order) {
  std::iota(order, order + batch, std::int64_t{0});
  if (!ignored.given) return batch;
  const auto end = std::stable_partition(order, order + batch,
                                         [&](std::int64_t i) { return !ignored.marks(labels[i]); });
  return end - order;
}

// Stable: equal labels stay in batch order. Labels and samples that fit one word together, which
// is the rule, sort twice as fast as pairs do.
void sort_by_label(const std::int64_t* labels, std::int64_t batch, std::int64_t* order,
                   std::int64_t count) {
  using Word = std::uint64_t;
  if (count == 0) return;
  const auto by_label = [&](std::int64_t i, std::int64_t j) { return labels[i] < labels[j]; };
  const auto [least, largest] = std::minmax_element(order, order + count, by_label);
  const Word origin = static_cast<Word>(labels[*least]);
  const Word spread = static_cast<Word>(labels[*largest]) - origin;
  int bits = 1;
  while (static_cast<Word>(batch) >> bits) ++bits;
  const Word sample = (Word{1} << bits) - 1;
  if (spread <= ~Word{0} >> bits) {
    std::vector<Word> keys(count);
    for (std::int64_t p = 0; p < count; ++p) {
      const Word i = static_cast<Word>(order[p]);
      keys[p] = (static_cast<Word>(labels[i]) - origin) << bits | i;
    }
    std::sort(keys.begin(), keys.end());
    for (std::int64_t p = 0; p < count; ++p) order[p] = static_cast<std::int64_t>(keys[p] & sample);
  } else {
    std::stable_sort(order, order + count, by_label);
  }
}

}  // namespace

std::int64_t group_labels(const std::int64_t* labels, std::int64_t batch, IgnoredLabel ignored,
                          std::int64_t* order, std::int64_t* segment, std::int64_t* offsets) {
  const std::int64_t count = put_ignored_last(labels, batch, ignored, order);
  sort_by_label(labels, batch, order, count);
  std::int64_t classes = 0;
  for (std::int64_t p = 0; p < count; ++p) {
    if (p == 0 || labels[order[p]] != labels[order[p - 1]]) offsets[classes++] = p;
    segment[order[p]] = classes - 1;
  }
  for (std::int64_t p = count; p < batch; ++p) segment[order[p]] = -1;
  std::fill(offsets + classes, offsets + batch + 1, count);
  return classes;
}

void group_labels(const TensorView& labels, const std::optional<std::int64_t>& ignored,
                  const TensorView& order, const TensorView& segment, const TensorView& offsets,
                  const TensorView& num_classes, const TensorView&, Execution) {
  const std::int64_t batch = labels.numel();
  const std::int64_t classes =
      group_labels(index_pointer(labels, "labels", batch), batch, IgnoredLabel(ignored),
                   index_output(order, "order", batch), index_output(segment, "segment", batch),
                   index_output(offsets, "offsets", batch + 1));
  *index_output(num_classes, "num_classes", 1) = classes;
}

std::int64_t group_labels_workspace(std::int64_t) { return 0; }

}  // namespace facelt::cpu
