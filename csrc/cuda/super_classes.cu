#include "row_reductions.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

constexpr int kLanes = 8;  // members that a block adds up side by side

// A block takes kWarp * kItems columns of one super class; each of its warps adds every kLanes-th
// member.
template <class W, class P, int kItems>
__global__ void means_kernel(const W* weight, const std::int64_t* order,
                             const std::int64_t* offsets, std::int64_t dimensions, P* means) {
  using A = Compute<W>;
  FACELT_SHARED(A, sums, kLanes * kWarp * kItems);
  const std::int64_t s = blockIdx.x;
  const int lane = lane_of_warp(), own = threadIdx.x / kWarp;
  const std::int64_t d = (static_cast<std::int64_t>(blockIdx.y) * kWarp + lane) * kItems;
  const std::int64_t begin = offsets[s], end = offsets[s + 1];
  A sum[kItems] = {};
  for (std::int64_t p = begin + own; p < end && d < dimensions; p += kLanes) {
    const auto pack = load_vector<Pack<W, kItems>>(weight + order[p] * dimensions + d);
    for (int item = 0; item < kItems; ++item) sum[item] += widen(pack.items[item]);
  }
  for (int item = 0; item < kItems; ++item) {
    sums[(own * kItems + item) * kWarp + lane] = sum[item];
  }
  __syncthreads();
  if (own != 0 || d >= dimensions) return;
  Pack<P, kItems> mean;
  for (int item = 0; item < kItems; ++item) {
    for (int other = 1; other < kLanes; ++other) {
      sum[item] += sums[(other * kItems + item) * kWarp + lane];
    }
    mean.items[item] = narrow<P>(sum[item] / static_cast<A>(end - begin));
  }
  store_vector(means + s * dimensions + d, mean);
}

// One warp a row.
template <class T, int kItems>
__global__ void shares_kernel(const T* grad_means, const std::int64_t* super_class,
                              const std::int64_t* offsets, std::int64_t count, std::int64_t rows,
                              std::int64_t dimensions, T* grad_weight) {
  using A = Compute<T>;
  const std::int64_t i = row_of_warp();
  if (i >= rows) return;
  const std::int64_t s = super_class[i];
  const bool valid = s >= 0 && s < count;
  const A members = valid ? static_cast<A>(offsets[s + 1] - offsets[s]) : A(0);
  for (std::int64_t d = lane_of_warp() * kItems; d < dimensions; d += kWarp * kItems) {
    Pack<T, kItems> pack;
    if (valid) pack = load_vector<Pack<T, kItems>>(grad_means + s * dimensions + d);
    for (int item = 0; item < kItems; ++item) {
      pack.items[item] = narrow<T>(valid ? widen(pack.items[item]) / members : A(NAN));
    }
    store_vector(grad_weight + i * dimensions + d, pack);
  }
}

}  // namespace

void super_class_mean_forward(const TensorView& weight, const TensorView& order,
                              const TensorView& offsets, const TensorView& means,
                              Execution execution) {
  const std::int64_t rows = weight.size(0), dimensions = weight.size(1), count = means.size(0);
  const int device = weight.device;
  if (count == 0) return;
  dispatch_pair(weight.dtype, means.dtype, "weight", "means", [&](auto w, auto p) {
    using W = decltype(w);
    using P = decltype(p);
    const W* x = pointer<const W>(weight, "weight", Scalar<W>::kType, rows * dimensions, device);
    P* out = pointer<P>(means, "means", Scalar<P>::kType, count * dimensions, device);
    const auto run = [&](auto kernel, int items) {
      const dim3 grid(blocks_for(count, 1), blocks_for(dimensions, kWarp * items));
      launch(kernel, grid, kLanes * kWarp, 0, stream_of(execution), x,
             pointer<const std::int64_t>(order, "order", ScalarType::kInt64, rows, device),
             pointer<const std::int64_t>(offsets, "offsets", ScalarType::kInt64, count + 1, device),
             dimensions, out);
    };
    constexpr int kItems = kWide<W>;
    if (aligned<kItems>(x, dimensions) && aligned<kItems>(out, dimensions)) {
      run(means_kernel<W, P, kItems>, kItems);
    } else {
      run(means_kernel<W, P, 1>, 1);
    }
  });
}

void super_class_mean_backward(const TensorView& grad_means, const TensorView& super_class,
                               const TensorView&, const TensorView& offsets,
                               const TensorView& grad_weight, Execution execution) {
  const std::int64_t rows = grad_weight.size(0), dimensions = grad_weight.size(1);
  const std::int64_t count = grad_means.size(0);
  const int device = grad_weight.device;
  dispatch_floating(grad_weight.dtype, "grad_weight", [&](auto zero) {
    using T = decltype(zero);
    const T* grad =
        pointer<const T>(grad_means, "grad_means", Scalar<T>::kType, count * dimensions, device);
    T* out = pointer<T>(grad_weight, "grad_weight", Scalar<T>::kType, rows * dimensions, device);
    const auto run = [&](auto kernel) {
      launch(
          kernel, blocks_for(rows, kRowWarps), kRowWarps * kWarp, 0, stream_of(execution), grad,
          pointer<const std::int64_t>(super_class, "super_class", ScalarType::kInt64, rows, device),
          pointer<const std::int64_t>(offsets, "offsets", ScalarType::kInt64, count + 1, device),
          count, rows, dimensions, out);
    };
    constexpr int kItems = kWide<T>;
    if (aligned<kItems>(grad, dimensions) && aligned<kItems>(out, dimensions)) {
      run(shares_kernel<T, kItems>);
    } else {
      run(shares_kernel<T, 1>);
    }
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
