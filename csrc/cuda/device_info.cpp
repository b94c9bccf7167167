#include "device_info.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace facelt::cuda {

namespace {

std::string readable(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string built_with() { return readable(CUDART_VERSION); }

void require_driver() {
  int driver = 0;
  const cudaError_t error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess || driver == 0) {
    throw std::runtime_error(std::string("no CUDA driver: ") + cudaGetErrorString(error));
  }
  // Within a major version an older driver runs newer kernels.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    throw std::runtime_error("facelt_ext was built with CUDA " + built_with() +
                             ", but the driver supports only CUDA " + readable(driver) +
                             "; update the driver, or rebuild with an older CUDA toolkit");
  }
}

}  // namespace facelt::cuda
