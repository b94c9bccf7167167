# The kernels of csrc/cuda, unchanged, as C++ in a namespace of their own.
if(NOT FACELT_EMULATION)
  return()
endif()

foreach(family ${families})
  set(unit ${CMAKE_CURRENT_BINARY_DIR}/emulated/${family}.cpp)
  file(CONFIGURE OUTPUT ${unit}
       CONTENT "#include \"${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/${family}.cu\"\n")
  target_sources(_C PRIVATE ${unit})
  set_source_files_properties(
    ${unit} PROPERTIES COMPILE_DEFINITIONS FACELT_EMULATION COMPILE_OPTIONS -Wno-unknown-pragmas)
endforeach()
file(GLOB runtime CONFIGURE_DEPENDS csrc/emulation/*.cpp)
target_sources(_C PRIVATE ${runtime})
target_compile_definitions(_C PRIVATE FACELT_WITH_EMULATION)
