#include "norms.h"
#include "streaming.h"

namespace facelt::cpu {

namespace {

template <class W, class P>
void write_means(const TensorView& weight, const TensorView& order, const TensorView& offsets,
                 const TensorView& means, int num_threads) {
  using A = Compute<W>;
  const std::int64_t rows = weight.size(0), dimensions = weight.size(1), count = means.size(0);
  const W* x = input<W>(weight, "weight", rows * dimensions);
  const std::int64_t* position = index_pointer(order, "order", rows);
  const std::int64_t* starts = index_pointer(offsets, "offsets", count + 1);
  P* out = output<P>(means, "means", count * dimensions);
  const RowKernels<A>& kernels = row_kernels<A>();
  advise_huge_pages(means);
  parallel(num_threads, [&] {
    RowReader<W> reader(dimensions);
    RowWriter<P> writer(dimensions);
#pragma omp for schedule(dynamic, 64) nowait
    for (std::int64_t s = 0; s < count; ++s) {
      A* mean = writer.place(out + s * dimensions);
      std::fill_n(mean, dimensions, A(0));
      for (std::int64_t p = starts[s]; p < starts[s + 1]; ++p) {
        if (p + 1 < rows) prefetch_row(x + position[p + 1] * dimensions, dimensions);
        kernels.add(reader.read(x + position[p] * dimensions), mean, dimensions);
      }
      kernels.divide(mean, static_cast<A>(starts[s + 1] - starts[s]), dimensions);
      writer.store(out + s * dimensions);
    }
  });
}

}  // namespace

void super_class_mean_forward(const TensorView& weight, const TensorView& order,
                              const TensorView& offsets, const TensorView& means,
                              Execution execution) {
  dispatch_pair(weight.dtype, means.dtype, "weight", "means", [&](auto w, auto p) {
    write_means<decltype(w), decltype(p)>(weight, order, offsets, means, threads(execution));
  });
}

// Super class after super class: each share is reckoned once, and copied to the members.
void super_class_mean_backward(const TensorView& grad_means, const TensorView&,
                               const TensorView& order, const TensorView& offsets,
                               const TensorView& grad_weight, Execution execution) {
  const std::int64_t rows = grad_weight.size(0), dimensions = grad_weight.size(1);
  const std::int64_t count = grad_means.size(0);
  const std::int64_t* position = index_pointer(order, "order", rows);
  const std::int64_t* starts = index_pointer(offsets, "offsets", count + 1);
  dispatch_floating(grad_weight.dtype, "grad_weight", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    const T* grad = input<T>(grad_means, "grad_means", count * dimensions);
    T* out = output<T>(grad_weight, "grad_weight", rows * dimensions);
    const TableWriter<T> table(out, rows, dimensions);
    advise_huge_pages(grad_weight);
    parallel(threads(execution), [&] {
      RowReader<T> reader(dimensions);
      std::vector<A> share(dimensions);
      std::vector<T> row(dimensions);
#pragma omp for schedule(dynamic, 64) nowait
      for (std::int64_t s = 0; s < count; ++s) {
        const A* source = reader.read(grad + s * dimensions);
        std::copy_n(source, dimensions, share.data());
        row_kernels<A>().divide(share.data(), static_cast<A>(starts[s + 1] - starts[s]),
                                dimensions);
        narrow_row(share.data(), row.data(), dimensions);
        for (std::int64_t p = starts[s]; p < starts[s + 1]; ++p) {
          table.write(position[p], row.data());
        }
      }
      table.finish();
#pragma omp for schedule(static) nowait
      for (std::int64_t p = 0; p < rows; ++p) {
        if (p >= starts[0] && p < starts[count]) continue;
        std::fill_n(out + position[p] * dimensions, dimensions,
                    narrow<T>(std::numeric_limits<A>::quiet_NaN()));
      }
    });
  });
}

}  // namespace facelt::cpu
