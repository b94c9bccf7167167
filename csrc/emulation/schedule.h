// What the host side of the emulation needs, without the CUDA names of runtime.h.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string_view>

namespace facelt::emulation {

/// A kernel broke a rule of CUDA or of the emulation. Thrown from launch.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Sets the order in which blocks, and threads between two rendezvous, run from the next launch of
/// this process on: "forward" (the default), "reverse" or "random". Each launch starts `seed` anew.
void set_schedule(std::string_view name, std::uint64_t seed = 0);

/// How many kernels this process has launched.
std::uint64_t launches();

}  // namespace facelt::emulation
