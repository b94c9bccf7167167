#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_config.h"
#include "cpu/large_memory.h"
#include "launchers.h"
#include "tensor_caster.h"

#if defined(FACELT_WITH_CUDA)
#include "cuda/device_info.h"
#endif
#if defined(FACELT_WITH_EMULATION)
#include "emulation/schedule.h"
#endif

namespace py = pybind11;
using facelt::ClusterMarginOptions;
using facelt::Execution;
using facelt::IgnoredLabel;
using facelt::MarginSoftmaxOptions;
using facelt::QuintupletOptions;
using facelt::RangeLossOptions;
using facelt::TensorView;

namespace {

#define FACELT_BIND(m, backend, name) \
  m.def(#name, facelt::backend::name, py::call_guard<py::gil_scoped_release>())

#define FACELT_BIND_BACKEND(m, backend)                       \
  do {                                                        \
    FACELT_BIND(m, backend, group_labels);                    \
    FACELT_BIND(m, backend, class_ranges_forward);            \
    FACELT_BIND(m, backend, class_ranges_backward);           \
    FACELT_BIND(m, backend, class_centroids_forward);         \
    FACELT_BIND(m, backend, class_centroids_backward);        \
    FACELT_BIND(m, backend, min_centroid_distance_forward);   \
    FACELT_BIND(m, backend, min_centroid_distance_backward);  \
    FACELT_BIND(m, backend, range_loss_forward);              \
    FACELT_BIND(m, backend, range_loss_backward);             \
    FACELT_BIND(m, backend, normalize_rows);                  \
    FACELT_BIND(m, backend, project_rows);                    \
    FACELT_BIND(m, backend, margin_softmax_targets);          \
    FACELT_BIND(m, backend, margin_softmax_normalizer);       \
    FACELT_BIND(m, backend, margin_softmax_coefficients);     \
    FACELT_BIND(m, backend, margin_softmax_gradient);         \
    FACELT_BIND(m, backend, compactness_select);              \
    FACELT_BIND(m, backend, compactness_reduce);              \
    FACELT_BIND(m, backend, compactness_capacity);            \
    FACELT_BIND(m, backend, super_class_mean_forward);        \
    FACELT_BIND(m, backend, super_class_mean_backward);       \
    FACELT_BIND(m, backend, dispersion_targets);              \
    FACELT_BIND(m, backend, dispersion_feature_gradient);     \
    FACELT_BIND(m, backend, dispersion_tail_gradient);        \
    FACELT_BIND(m, backend, cluster_margin_forward);          \
    FACELT_BIND(m, backend, cluster_margin_backward);         \
    FACELT_BIND(m, backend, quintuplet_forward);              \
    FACELT_BIND(m, backend, quintuplet_backward);             \
    FACELT_BIND(m, backend, group_labels_workspace);          \
    FACELT_BIND(m, backend, class_ranges_workspace);          \
    FACELT_BIND(m, backend, min_centroid_distance_workspace); \
    FACELT_BIND(m, backend, range_loss_workspace);            \
    FACELT_BIND(m, backend, quintuplet_workspace);            \
  } while (false)

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = FACELT_VERSION;
  info["compiler"] = compiler();
  py::list backends;
  backends.append("cpu");
#if defined(FACELT_WITH_CUDA)
  backends.append("cuda");
  info["cuda_version"] = facelt::cuda::built_with();
  info["cuda_archs"] = FACELT_CUDA_ARCHS;
  info["cuda_missing"] = py::none();
#else
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::none();
  info["cuda_missing"] = FACELT_CUDA_MISSING;
#endif
#if defined(FACELT_WITH_EMULATION)
  backends.append("emulated");
#endif
  info["backends"] = backends;
  return info;
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Execution> {
  PYBIND11_TYPE_CASTER(Execution, const_name("int"));

  bool load(handle source, bool) {
    value.stream_or_threads = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(source.ptr()));
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

// A number that is one of `Reduction`.
inline bool is_reduction(int reduction) { return reduction >= 0 && reduction <= 2; }

// A label, or none.
using Ignored = std::optional<std::int64_t>;

// (g1, g2, g3, reduction, ignored)
template <>
struct type_caster<QuintupletOptions> {
  PYBIND11_TYPE_CASTER(QuintupletOptions,
                       const_name("tuple[float, float, float, int, int | None]"));

  bool load(handle source, bool) {
    const auto [g1, g2, g3, reduction, ignored] =
        py::cast<std::tuple<double, double, double, int, Ignored>>(source);
    if (!is_reduction(reduction)) return false;
    value = {{g1, g2, g3}, static_cast<facelt::Reduction>(reduction), IgnoredLabel(ignored)};
    return true;
  }
};

// (k, margin, alpha, beta, squared, ignored)
template <>
struct type_caster<RangeLossOptions> {
  PYBIND11_TYPE_CASTER(RangeLossOptions,
                       const_name("tuple[int, float, float, float, bool, int | None]"));

  bool load(handle source, bool) {
    const auto [k, margin, alpha, beta, squared, ignored] =
        py::cast<std::tuple<std::int64_t, double, double, double, bool, Ignored>>(source);
    value = {k, margin, alpha, beta, squared, IgnoredLabel(ignored)};
    return true;
  }
};

// (scale, angular_multiplier, normalize_features, normalize_weight, class_offset, num_classes,
// ignore_index)
template <>
struct type_caster<MarginSoftmaxOptions> {
  PYBIND11_TYPE_CASTER(MarginSoftmaxOptions,
                       const_name("tuple[float, int, bool, bool, int, int, int]"));

  bool load(handle source, bool) {
    const auto [scale, multiplier, features, weight, offset, classes, ignored] = py::cast<
        std::tuple<double, std::int64_t, bool, bool, std::int64_t, std::int64_t, std::int64_t>>(
        source);
    value = {scale, multiplier, features, weight, offset, classes, ignored};
    return true;
  }
};

// (between_margin, within_margin, normalize, reduction, ignored)
template <>
struct type_caster<ClusterMarginOptions> {
  PYBIND11_TYPE_CASTER(ClusterMarginOptions,
                       const_name("tuple[float, float, bool, int, int | None]"));

  bool load(handle source, bool) {
    const auto [between, within, normalize, reduction, ignored] =
        py::cast<std::tuple<double, double, bool, int, Ignored>>(source);
    if (!is_reduction(reduction)) return false;
    value = {between, within, normalize, static_cast<facelt::Reduction>(reduction),
             IgnoredLabel(ignored)};
    return true;
  }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native kernels of facelt_ext; called by facelt_ext.functional.";
  facelt::TorchNames::get();
  m.def("build_info", build_info);
  m.def("no_operation", [](const TensorView&) {}, "Reads a tensor's layout; for measuring that.");

  py::class_<facelt::cpu::LargeMemory>(m, "LargeMemory", py::buffer_protocol())
      .def(py::init<std::size_t>(), py::arg("bytes"))
      .def_buffer([](const facelt::cpu::LargeMemory& memory) {
        return py::buffer_info(static_cast<std::uint8_t*>(memory.data()), memory.size());
      });

  py::module_ cpu = m.def_submodule("cpu");
  FACELT_BIND_BACKEND(cpu, cpu);
#if defined(FACELT_WITH_CUDA)
  py::module_ cuda = m.def_submodule("cuda");
  FACELT_BIND_BACKEND(cuda, cuda);
  cuda.def("require_driver", facelt::cuda::require_driver);
#endif
#if defined(FACELT_WITH_EMULATION)
  py::module_ emulated = m.def_submodule("emulated");
  FACELT_BIND_BACKEND(emulated, emulated);
  emulated.def("launches", facelt::emulation::launches);
  emulated.def("set_schedule", facelt::emulation::set_schedule, py::arg("schedule"),
               py::arg("seed") = 0);
#endif
}
