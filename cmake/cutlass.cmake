# specextend_use_cutlass(<target>): CUTLASS headers for the sources of <target>, which alone pay for
# finding them. In order: SPECEXTEND_CUTLASS_DIR, the installed nvidia-cutlass wheel, a pinned download.
set(SPECEXTEND_CUTLASS_DIR "" CACHE PATH "Folder that holds CUTLASS's include/")

function(specextend_use_cutlass target)
  set(dir "${SPECEXTEND_CUTLASS_DIR}")
  if(NOT dir)
    execute_process(
      COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH --unset=PYTHONNOUSERSITE ${Python_EXECUTABLE} -c
        "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0] + '/source')"
      OUTPUT_VARIABLE wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE missing)
    if(NOT missing)
      set(dir "${wheel}")
    endif()
  endif()
  if(NOT dir)
    include(FetchContent)
    FetchContent_Declare(cutlass URL https://github.com/NVIDIA/cutlass/archive/refs/tags/v4.2.0.tar.gz)
    FetchContent_GetProperties(cutlass)
    if(NOT cutlass_POPULATED)
      FetchContent_Populate(cutlass)
    endif()
    set(dir "${cutlass_SOURCE_DIR}")
  endif()
  if(NOT EXISTS "${dir}/include/cutlass/version.h")
    message(FATAL_ERROR "no CUTLASS headers in ${dir}/include: pip install --no-deps nvidia-cutlass, "
                        "or set SPECEXTEND_CUTLASS_DIR")
  endif()
  target_include_directories(${target} SYSTEM PRIVATE ${dir}/include ${dir}/tools/util/include)
endfunction()
