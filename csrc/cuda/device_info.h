#pragma once

#include <string>

namespace facelt::cuda {

// The CUDA version that the kernels were built with, as "13.0".
std::string built_with();

// Throws, naming both versions, where the driver is older than the CUDA that built the kernels.
void require_driver();

}  // namespace facelt::cuda
