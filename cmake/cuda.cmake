# Decides whether the CUDA kernels are built, and adds them to _C.

# Compiles and links a small program; `result` is empty if that works, else why not. A compiler of the
# system that is too new for nvcc shows here, and a toolkit of which a part is missing.
function(facelt_try_nvcc nvcc result)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/try_nvcc)
  file(WRITE ${folder}/program.cu [[
#include <cuda_runtime.h>
__global__ void store(int* values) { values[threadIdx.x] = 1; }
int main() {
  store<<<1, 1>>>(nullptr);
  return cudaDeviceSynchronize();
}
]])
  set(host ${CMAKE_CUDA_HOST_COMPILER} $ENV{CUDAHOSTCXX})
  if(host)
    list(GET host 0 host)
    set(host -ccbin ${host})
  endif()
  separate_arguments(flags UNIX_COMMAND "${CMAKE_CUDA_FLAGS} $ENV{CUDAFLAGS}")
  execute_process(
    COMMAND ${nvcc} -std=c++17 ${host} ${flags} program.cu -o program
    WORKING_DIRECTORY ${folder}
    RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(code EQUAL 0)
    set(${result} "" PARENT_SCOPE)
    return()
  endif()
  string(REGEX MATCH "[^\n]*([Ee]rror|[Ff]atal)[^\n]*" line "${output}")
  if(NOT line)
    string(REGEX MATCH "[^\n]+" line "${output}")
  endif()
  if(NOT line)
    set(line "${code}")
  endif()
  string(STRIP "${line}" line)
  set(${result} "${nvcc} cannot compile: ${line}" PARENT_SCOPE)
endfunction()

# The major architectures from Turing (7.5) on that this nvcc knows; the newest also as PTX, for GPUs
# that come after it.
function(facelt_default_archs nvcc result)
  execute_process(COMMAND ${nvcc} --list-gpu-code OUTPUT_VARIABLE codes)
  string(REGEX MATCHALL "sm_[0-9]+" codes "${codes}")
  set(archs "")
  foreach(code ${codes})
    string(REPLACE "sm_" "" number ${code})
    math(EXPR minor "${number} % 10")
    if(number EQUAL 75 OR (number GREATER 75 AND minor EQUAL 0))
      list(APPEND archs ${number})
    endif()
  endforeach()
  list(POP_BACK archs newest)
  list(TRANSFORM archs APPEND "-real")
  set(${result} ${archs} ${newest} PARENT_SCOPE)
endfunction()

string(TOLOWER "${FACELT_CUDA}" wanted)
set(cuda_missing "")
if(wanted MATCHES "^(off|0|false|no)$")
  set(cuda_missing "FACELT_CUDA=${FACELT_CUDA} turned it off")
elseif(NOT wanted MATCHES "^(auto|on|1|true|yes)$")
  facelt_fail("FACELT_CUDA: expected auto, on or off, got ${FACELT_CUDA}")
else()
  set(nvcc ${FACELT_NVCC})
  if(CMAKE_CUDA_COMPILER)
    set(nvcc ${CMAKE_CUDA_COMPILER})
  endif()
  if(NOT nvcc)
    set(cuda_missing "no nvcc was found in CUDACXX, CUDA_HOME, PATH, /usr/local/cuda or the nvidia \
pip packages")
  elseif(NOT nvcc STREQUAL FACELT_NVCC_WORKS)
    facelt_try_nvcc(${nvcc} cuda_missing)
    if(NOT cuda_missing)
      set(FACELT_NVCC_WORKS ${nvcc} CACHE INTERNAL "The nvcc that was tried")
    endif()
  endif()
  if(cuda_missing AND NOT wanted STREQUAL "auto")
    facelt_fail("FACELT_CUDA=${FACELT_CUDA}, but ${cuda_missing}")
  endif()
endif()

if(cuda_missing)
  message(STATUS "facelt_ext: building without CUDA kernels: ${cuda_missing}")
  # It becomes a string literal in C++.
  string(REPLACE "\\" "\\\\" cuda_missing "${cuda_missing}")
  string(REPLACE "\"" "\\\"" cuda_missing "${cuda_missing}")
  return()
endif()

if(NOT FACELT_CUDA_ARCHS)
  facelt_default_archs(${nvcc} FACELT_CUDA_ARCHS)
endif()
set(CMAKE_CUDA_COMPILER ${nvcc})
set(CMAKE_CUDA_ARCHITECTURES ${FACELT_CUDA_ARCHS})
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
message(STATUS "facelt_ext: building CUDA kernels with ${nvcc} for ${FACELT_CUDA_ARCHS}")

foreach(family ${families})
  target_sources(_C PRIVATE csrc/cuda/${family}.cu)
endforeach()
target_sources(_C PRIVATE csrc/cuda/device_info.cpp)
set_target_properties(_C PROPERTIES CUDA_ARCHITECTURES "${FACELT_CUDA_ARCHS}"
                                    CUDA_RUNTIME_LIBRARY Static)
target_include_directories(_C PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
list(JOIN FACELT_CUDA_ARCHS " " cuda_archs)
target_compile_definitions(_C PRIVATE FACELT_WITH_CUDA)
