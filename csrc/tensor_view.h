// What a native function receives of a tensor: where it lies and how it is laid out. It owns
// nothing.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace facelt {

enum class ScalarType : std::uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16, kInt64, kUInt8 };

inline const char* name_of(ScalarType type) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16", "int64", "uint8"};
  return kNames[static_cast<int>(type)];
}

inline std::int64_t size_of(ScalarType type) {
  constexpr std::int64_t kSizes[] = {8, 4, 2, 2, 8, 1};
  return kSizes[static_cast<int>(type)];
}

constexpr int kCpuDevice = -1;

struct TensorView {
  static constexpr int kMaxRank = 4;

  void* data = nullptr;
  ScalarType dtype = ScalarType::kUInt8;
  int rank = 0;
  int device = kCpuDevice;  // the CUDA device's index, or kCpuDevice
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};  // in elements

  std::int64_t size(int dimension) const { return shape[dimension]; }

  std::int64_t numel() const {
    std::int64_t product = 1;
    for (int i = 0; i < rank; ++i) product *= shape[i];
    return product;
  }

  bool is_contiguous() const {
    if (numel() == 0) return true;
    std::int64_t expected = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }

  std::string describe() const {
    std::string text = std::string(name_of(dtype)) + " [";
    for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    text += device == kCpuDevice ? "] on cpu" : "] on cuda:" + std::to_string(device);
    return is_contiguous() ? text : text + ", not contiguous";
  }
};

// The pointer of a contiguous view whose dtype and number of elements were agreed on by the caller.
// Everything that reaches the kernels passes here, so a mistake in Python cannot read out of
// bounds.
template <class T>
T* pointer(const TensorView& view, const char* name, ScalarType dtype, std::int64_t numel,
           int device) {
  if (view.dtype != dtype || view.numel() != numel || view.device != device ||
      !view.is_contiguous()) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(numel) +
                                " contiguous elements of " + name_of(dtype) + " on " +
                                (device == kCpuDevice ? "cpu" : "cuda:" + std::to_string(device)) +
                                ", got " + view.describe());
  }
  return static_cast<T*>(view.data);
}

}  // namespace facelt
