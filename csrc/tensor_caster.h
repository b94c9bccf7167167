// Reads a torch.Tensor through its Python attributes, so that no torch header and no torch library
// is needed: the module that results works with any torch.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor_view.h"

namespace facelt {

namespace py = pybind11;

// Looked up once, while the module is imported; never freed, since the interpreter may be gone when
// statics are.
struct TorchNames {
  PyObject* tensor_type;
  PyObject* parameter_type;
  PyObject* no_dispatch;  // Tensor.__torch_dispatch__, which does nothing
  PyObject* dtypes[6];
  PyObject* torch_dispatch = PyUnicode_InternFromString("__torch_dispatch__");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");

  TorchNames() {
    const py::module_ torch = py::module_::import("torch");
    tensor_type = py::object(torch.attr("Tensor")).release().ptr();
    parameter_type = py::object(torch.attr("nn").attr("Parameter")).release().ptr();
    no_dispatch = py::object(torch.attr("Tensor").attr("__torch_dispatch__")).release().ptr();
    for (int i = 0; i < 6; ++i) {
      dtypes[i] = py::object(torch.attr(name_of(static_cast<ScalarType>(i)))).release().ptr();
    }
  }

  static const TorchNames& get() {
    static const TorchNames* const kNames = new TorchNames;
    return *kNames;
  }
};

inline py::object call_method(PyObject* object, PyObject* name) {
  PyObject* const result = PyObject_CallMethodNoArgs(object, name);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object attribute(PyObject* object, PyObject* name) {
  PyObject* const result = PyObject_GetAttr(object, name);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline void read_integers(PyObject* tuple, std::array<std::int64_t, TensorView::kMaxRank>& out) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
}

inline ScalarType scalar_type(PyObject* dtype) {
  const TorchNames& names = TorchNames::get();
  for (int i = 0; i < 6; ++i) {
    if (dtype == names.dtypes[i]) return static_cast<ScalarType>(i);
  }
  throw py::type_error("no kernel takes tensors of dtype " + std::string(py::str(dtype)));
}

// A type with a __torch_dispatch__ of its own may hold its numbers anywhere: data_ptr() then says
// nothing, and may even be other than 0.
inline void check_readable(PyObject* tensor) {
  const TorchNames& names = TorchNames::get();
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type == names.tensor_type || type == names.parameter_type) return;
  const std::string name = Py_TYPE(tensor)->tp_name;
  if (!PyType_IsSubtype(Py_TYPE(tensor), reinterpret_cast<PyTypeObject*>(names.tensor_type))) {
    throw py::type_error("expected a torch.Tensor, got " + name);
  }
  if (attribute(type, names.torch_dispatch).ptr() != names.no_dispatch) {
    throw py::type_error("expected a tensor with memory of its own, got " + name);
  }
}

inline TensorView view_of(PyObject* tensor) {
  const TorchNames& names = TorchNames::get();
  check_readable(tensor);
  TensorView view;
  view.dtype = scalar_type(attribute(tensor, names.dtype).ptr());
  const py::object shape = attribute(tensor, names.shape);
  view.rank = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
  if (view.rank > TensorView::kMaxRank) {
    throw py::value_error("no kernel takes tensors of " + std::to_string(view.rank) +
                          " dimensions");
  }
  read_integers(shape.ptr(), view.shape);
  read_integers(call_method(tensor, names.stride).ptr(), view.strides);
  if (attribute(tensor, names.is_cpu).ptr() == Py_True) {
    view.device = kCpuDevice;
  } else if (attribute(tensor, names.is_cuda).ptr() == Py_True) {
    view.device = static_cast<int>(PyLong_AsLong(call_method(tensor, names.get_device).ptr()));
  } else {
    throw py::value_error("kernels take tensors on cpu and cuda devices only");
  }
  view.data = PyLong_AsVoidPtr(call_method(tensor, names.data_ptr).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!view.data && view.numel() > 0) throw py::value_error("the tensor has no memory");
  return view;
}

}  // namespace facelt

namespace pybind11::detail {

template <>
struct type_caster<facelt::TensorView> {
  PYBIND11_TYPE_CASTER(facelt::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    value = facelt::view_of(source.ptr());
    return true;
  }
};

}  // namespace pybind11::detail
