#include "norms.h"

namespace facelt::cpu {

namespace {

template <class T, class P>
void normalize(const TensorView& x, const TensorView& inverse_norms, const TensorView& normalized,
               int num_threads) {
  using A = Compute<T>;
  const std::int64_t rows = x.size(0), dimensions = x.size(1);
  const T* in = input<T>(x, "x", rows * dimensions);
  A* inverses = output<A>(inverse_norms, "inverse_norms", rows);
  const bool wanted = normalized.numel() > 0;
  P* out = output<P>(normalized, "normalized", wanted ? rows * dimensions : 0);
  parallel(num_threads, [&] {
    RowReader<T> reader(dimensions);
    RowWriter<P> writer(dimensions);
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < rows; ++i) {
      const A* row = reader.read(in + i * dimensions);
      inverses[i] = inverse_norm(row, dimensions);
      if (!wanted) continue;
      row_kernels<A>().scale(row, inverses[i], writer.place(out + i * dimensions), dimensions);
      writer.store(out + i * dimensions);
    }
  });
}

template <class R, class T>
void project(const TensorView& raw, const TensorView& x, const TensorView& inverse_norms,
             const TensorView& gain, bool scaled, const TensorView& grad_x, int num_threads) {
  using A = Compute<T>;
  const std::int64_t rows = x.size(0), dimensions = x.size(1);
  const R* in = input<R>(raw, "raw", rows * dimensions);
  const T* points = input<T>(x, "x", rows * dimensions);
  const A* inverses = input<A>(inverse_norms, "inverse_norms", rows);
  const bool one_gain = gain.numel() == 1;
  const A* gains = input<A>(gain, "gain", one_gain ? 1 : rows);
  T* out = output<T>(grad_x, "grad_x", rows * dimensions);
  parallel(num_threads, [&] {
    RowReader<R> raw_reader(dimensions);
    RowReader<T> reader(dimensions);
    RowWriter<T> writer(dimensions);
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < rows; ++i) {
      T* target = out + i * dimensions;
      const A own_gain = gains[one_gain ? 0 : i];
      A* place = writer.place(target);
      if (own_gain == A(0)) {
        std::fill_n(place, dimensions, A(0));
      } else {
        row_kernels<A>().project(raw_reader.read(in + i * dimensions),
                                 reader.read(points + i * dimensions), inverses[i],
                                 scaled ? own_gain : own_gain * inverses[i], place, dimensions);
      }
      writer.store(target);
    }
  });
}

}  // namespace

void normalize_rows(const TensorView& x, const TensorView& inverse_norms,
                    const TensorView& normalized, Execution execution) {
  dispatch_pair(x.dtype, normalized.dtype, "x", "normalized", [&](auto t, auto p) {
    normalize<decltype(t), decltype(p)>(x, inverse_norms, normalized, threads(execution));
  });
}

void project_rows(const TensorView& raw, const TensorView& x, const TensorView& inverse_norms,
                  const TensorView& gain, bool scaled, const TensorView& grad_x,
                  Execution execution) {
  dispatch_pair(raw.dtype, x.dtype, "raw", "x", [&](auto r, auto t) {
    project<decltype(r), decltype(t)>(raw, x, inverse_norms, gain, scaled, grad_x,
                                      threads(execution));
  });
}

}  // namespace facelt::cpu
