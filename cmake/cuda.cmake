# Decides whether the CUDA kernels are built, and adds them to _C.

# nvcc is looked for where a user would expect it: CUDA_HOME, PATH, /usr/local/cuda, and the
# nvidia-cuda-nvcc packages of the Python that builds.
function(facelt_find_nvcc result)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import site, sys; print(';'.join(sys.path))"
    OUTPUT_VARIABLE python_path OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(pip_folders "")
  foreach(folder ${python_path})
    file(GLOB found "${folder}/nvidia/*/bin")
    list(APPEND pip_folders ${found})
  endforeach()
  find_program(
    FACELT_NVCC nvcc
    HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin
    PATHS /usr/local/cuda/bin ${pip_folders})
  set(${result} ${FACELT_NVCC} PARENT_SCOPE)
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
  message(FATAL_ERROR "FACELT_CUDA: expected auto, on or off, got ${FACELT_CUDA}")
else()
  facelt_find_nvcc(nvcc)
  if(NOT nvcc)
    set(cuda_missing "no nvcc was found in CUDA_HOME, PATH, /usr/local/cuda or the nvidia pip packages")
    if(NOT wanted STREQUAL "auto")
      message(FATAL_ERROR "FACELT_CUDA=${FACELT_CUDA}, but ${cuda_missing}")
    endif()
  endif()
endif()

if(cuda_missing)
  message(STATUS "facelt_ext: building without CUDA kernels: ${cuda_missing}")
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
