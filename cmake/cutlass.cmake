# specextend_use_cutlass(<target>): CUTLASS headers for the sources of <target>, which alone pay for
# finding them. In order: SPECEXTEND_CUTLASS_DIR, the installed nvidia-cutlass wheel, a pinned download.
set(SPECEXTEND_CUTLASS_DIR "" CACHE PATH "Folder that holds CUTLASS's include/")

# The wheel's folder that holds include/, or "". pip's build isolation is a PYTHONPATH, without which
# the interpreter sees what is installed; a wheel in a folder of its own is found by PYTHONPATH alone.
function(specextend_find_cutlass_wheel out)
  set(${out} "" PARENT_SCOPE)
  foreach(environment "--unset=PYTHONPATH;--unset=PYTHONNOUSERSITE" "")
    execute_process(
      COMMAND ${CMAKE_COMMAND} -E env ${environment} ${Python_EXECUTABLE} -c
        "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0] + '/source')"
      OUTPUT_VARIABLE wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE missing)
    if(NOT missing)
      set(${out} "${wheel}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

function(specextend_use_cutlass target)
  set(dir "${SPECEXTEND_CUTLASS_DIR}")
  if(NOT dir)
    specextend_find_cutlass_wheel(dir)
  endif()
  if(NOT dir)
    set(dir "${CMAKE_BINARY_DIR}/cutlass-4.2.0")
    if(NOT EXISTS "${dir}/include")
      set(archive "${CMAKE_BINARY_DIR}/cutlass.tar.gz")
      file(DOWNLOAD https://github.com/NVIDIA/cutlass/archive/refs/tags/v4.2.0.tar.gz ${archive}
        INACTIVITY_TIMEOUT 20 TLS_VERIFY ON STATUS status)
      list(GET status 0 failed)
      if(NOT failed)
        file(ARCHIVE_EXTRACT INPUT ${archive} DESTINATION ${CMAKE_BINARY_DIR})
      endif()
    endif()
  endif()
  if(NOT EXISTS "${dir}/include/cutlass/version.h")
    message(FATAL_ERROR
      "the kernels for sm_90a need CUTLASS's headers, and there are none in ${dir}/include. Either "
      "pip install --no-deps nvidia-cutlass, or set SPECEXTEND_CUTLASS_DIR to a checkout of CUTLASS "
      "4.2 or newer, or build without these kernels: CMAKE_ARGS=-DSPECEXTEND_SM90A=OFF")
  endif()
  message(STATUS "CUTLASS: ${dir}")
  target_include_directories(${target} SYSTEM PRIVATE ${dir}/include)
endfunction()
