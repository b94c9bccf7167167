#include "row_reductions.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

template <class T, class P>
__global__ void normalize_kernel(const T* x, std::int64_t rows, std::int64_t dimensions,
                                 Compute<T>* inverse_norms, P* normalized) {
  const std::int64_t i = row_of_warp();
  if (i >= rows) return;
  const T* row = x + i * dimensions;
  const Compute<T> inverse = inverse_norm(row, dimensions);
  if (lane_of_warp() == 0) inverse_norms[i] = inverse;
  if (normalized == nullptr) return;
  for (std::int64_t d = lane_of_warp(); d < dimensions; d += kWarp) {
    normalized[i * dimensions + d] = narrow<P>(widen(row[d]) * inverse);
  }
}

template <class R, class T>
__global__ void project_kernel(const R* raw, const T* x, const Compute<T>* inverse_norms,
                               const Compute<T>* gain, bool one_gain, bool scaled,
                               std::int64_t rows, std::int64_t dimensions, T* grad_x) {
  using A = Compute<T>;
  const std::int64_t i = row_of_warp();
  if (i >= rows) return;
  const R* g = raw + i * dimensions;
  const T* row = x + i * dimensions;
  const A inverse = inverse_norms[i], own_gain = gain[one_gain ? 0 : i];
  A along = 0;
  for (std::int64_t d = lane_of_warp(); d < dimensions; d += kWarp) {
    along += widen(g[d]) * widen(row[d]);
  }
  along = inverse * warp_sum(along);
  const A factor = scaled ? own_gain : own_gain * inverse;
  for (std::int64_t d = lane_of_warp(); d < dimensions; d += kWarp) {
    const A gradient = factor * (widen(g[d]) - along * (inverse * widen(row[d])));
    grad_x[i * dimensions + d] = narrow<T>(own_gain == A(0) ? A(0) : gradient);
  }
}

}  // namespace

void normalize_rows(const TensorView& x, const TensorView& inverse_norms,
                    const TensorView& normalized, Execution execution) {
  const std::int64_t rows = x.size(0), dimensions = x.size(1);
  const std::int64_t wanted = normalized.numel() > 0 ? rows * dimensions : 0;
  const int device = x.device;
  dispatch_pair(x.dtype, normalized.dtype, "x", "normalized", [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    using A = Compute<T>;
    P* out = pointer<P>(normalized, "normalized", Scalar<P>::kType, wanted, device);
    launch(normalize_kernel<T, P>, blocks_for(rows, kRowWarps), kRowWarps * kWarp, 0,
           stream_of(execution),
           pointer<const T>(x, "x", Scalar<T>::kType, rows * dimensions, device), rows, dimensions,
           pointer<A>(inverse_norms, "inverse_norms", Scalar<A>::kType, rows, device),
           wanted > 0 ? out : nullptr);
  });
}

void project_rows(const TensorView& raw, const TensorView& x, const TensorView& inverse_norms,
                  const TensorView& gain, bool scaled, const TensorView& grad_x,
                  Execution execution) {
  const std::int64_t rows = x.size(0), dimensions = x.size(1);
  const bool one_gain = gain.numel() == 1;
  const int device = x.device;
  dispatch_pair(raw.dtype, x.dtype, "raw", "x", [&](auto r, auto t) {
    using R = decltype(r);
    using T = decltype(t);
    using A = Compute<T>;
    launch(project_kernel<R, T>, blocks_for(rows, kRowWarps), kRowWarps * kWarp, 0,
           stream_of(execution),
           pointer<const R>(raw, "raw", Scalar<R>::kType, rows * dimensions, device),
           pointer<const T>(x, "x", Scalar<T>::kType, rows * dimensions, device),
           pointer<const A>(inverse_norms, "inverse_norms", Scalar<A>::kType, rows, device),
           pointer<const A>(gain, "gain", Scalar<A>::kType, one_gain ? 1 : rows, device), one_gain,
           scaled, rows, dimensions,
           pointer<T>(grad_x, "grad_x", Scalar<T>::kType, rows * dimensions, device));
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
