include(CheckCXXCompilerFlag)

# specextend_add_isa(<target>): one object library per CPU instruction set. Their sources
# (csrc/cpu/isa/*.cpp) see raw pointers and PODs only: inline code shared with other translation
# units, compiled with these flags, could be picked by the linker for a machine that lacks them.
function(specextend_add_isa target)
  set(isas baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    list(APPEND isas avx2 avx512 avx512_bf16)
    # GCC from 11 and Clang from 12 on; tiles are asked of Linux.
    check_cxx_compiler_flag("-mamx-tile -mamx-bf16" SPECEXTEND_COMPILER_HAS_AMX)
    if(SPECEXTEND_COMPILER_HAS_AMX AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
      list(APPEND isas amx)
    endif()
  endif()
  set(flags_baseline "")
  set(flags_avx2 -mavx2 -mfma -mf16c)
  set(flags_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c)
  set(flags_avx512_bf16 ${flags_avx512} -mavx512bf16)
  set(flags_amx ${flags_avx512_bf16} -mamx-tile -mamx-bf16)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    set(quiet -Wno-maybe-uninitialized -Wno-uninitialized)  # GCC's own AVX-512 headers set them off (GCC bug 105593)
  endif()
  foreach(isa IN LISTS isas)
    add_library(isa_${isa} OBJECT csrc/cpu/isa/${isa}.cpp)
    target_include_directories(isa_${isa} PRIVATE csrc)
    target_compile_options(isa_${isa} PRIVATE -O3 -Wall -Wextra -ffp-contract=off ${quiet}
                           ${flags_${isa}})
    target_compile_definitions(isa_${isa} PRIVATE SPECEXTEND_ISA=${isa})
    target_link_libraries(${target} PRIVATE isa_${isa})
    string(TOUPPER ${isa} upper)
    target_compile_definitions(${target} PRIVATE SPECEXTEND_HAS_ISA_${upper})
  endforeach()
endfunction()
