#include "groups.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

// A stable sort by counting: one warp counts, for its sample, the labels that come before.
__global__ void rank_labels_kernel(const std::int64_t* labels, std::int64_t batch,
                                   IgnoredLabel ignored, std::int64_t* order, std::int64_t* starts,
                                   std::int64_t* taking_part, unsigned* ticket) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (ticket != nullptr) *ticket = 0;
    if (batch == 0) *taking_part = 0;
  }
  const std::int64_t i =
      static_cast<std::int64_t>(blockIdx.x) * (kGroupThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= batch) return;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t label = labels[i];
  const bool last = ignored.marks(label);
  long long smaller = 0, equal_before = 0;
  for (std::int64_t j = lane; j < batch; j += kWarp) {
    const std::int64_t other = labels[j];
    smaller += (last || other < label) && !ignored.marks(other);
    equal_before += other == label && j < i;
  }
  smaller = warp_sum(smaller);
  equal_before = warp_sum(equal_before);
  if (lane == 0) {
    const std::int64_t position = smaller + equal_before;
    order[position] = i;
    starts[position] = smaller;
    if (position == batch - 1) *taking_part = last ? smaller : batch;
  }
}

__global__ void number_segments_kernel(Numbering numbering) { number_segments(numbering); }

}  // namespace

void launch_rank_labels(const std::int64_t* labels, std::int64_t batch, IgnoredLabel ignored,
                        std::int64_t* order, std::int64_t* starts, std::int64_t* taking_part,
                        unsigned* ticket, stream_t stream) {
  launch(rank_labels_kernel, blocks_for(batch, kGroupThreads / kWarp), kGroupThreads, 0, stream,
         labels, batch, ignored, order, starts, taking_part, ticket);
}

void group_labels(const TensorView& labels, const std::optional<std::int64_t>& ignored,
                  const TensorView& order, const TensorView& segment, const TensorView& offsets,
                  const TensorView& num_classes, const TensorView& workspace, Execution execution) {
  const std::int64_t batch = labels.numel();
  const int device = labels.device;
  constexpr ScalarType kIndex = ScalarType::kInt64;
  Arena arena(workspace_pointer(workspace, group_labels_workspace(batch), device));
  std::int64_t* starts = arena.take<std::int64_t>(batch);
  const Numbering numbering{pointer<std::int64_t>(order, "order", kIndex, batch, device),
                            starts,
                            batch,
                            pointer<std::int64_t>(segment, "segment", kIndex, batch, device),
                            pointer<std::int64_t>(offsets, "offsets", kIndex, batch + 1, device),
                            pointer<std::int64_t>(num_classes, "num_classes", kIndex, 1, device)};
  launch_rank_labels(pointer<const std::int64_t>(labels, "labels", kIndex, batch, device), batch,
                     IgnoredLabel(ignored),
                     pointer<std::int64_t>(order, "order", kIndex, batch, device), starts,
                     numbering.offsets + batch, nullptr, stream_of(execution));
  launch(number_segments_kernel, 1, kGroupThreads, 0, stream_of(execution), numbering);
}

std::int64_t group_labels_workspace(std::int64_t batch) {
  Arena arena;
  arena.take<std::int64_t>(batch);
  return arena.used();
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
