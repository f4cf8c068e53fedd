# The library jax_gptq_cpu_kernels: plain C++, one file per instruction set, chosen at run time.
set(cpu_dir ${CMAKE_CURRENT_LIST_DIR})
set(sources ${cpu_dir}/dispatch.cc ${cpu_dir}/kernel_portable.cc)
set(JAX_GPTQ_KERNEL_DEFINITIONS)
set(JAX_GPTQ_X86 OFF)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(JAX_GPTQ_X86 ON)
  set(JAX_GPTQ_KERNEL_DEFINITIONS JAX_GPTQ_X86)
  set(JAX_GPTQ_AVX2_OPTIONS -mavx2 -mfma -mf16c)
  list(APPEND sources ${cpu_dir}/kernel_avx2.cc ${cpu_dir}/kernel_avx_vnni.cc
       ${cpu_dir}/kernel_avx512_vnni.cc)
  set_source_files_properties(${cpu_dir}/kernel_avx2.cc PROPERTIES
                              COMPILE_OPTIONS "${JAX_GPTQ_AVX2_OPTIONS}")
  set_source_files_properties(${cpu_dir}/kernel_avx_vnni.cc PROPERTIES
                              COMPILE_OPTIONS "${JAX_GPTQ_AVX2_OPTIONS};-mavxvnni")
  set_source_files_properties(
    ${cpu_dir}/kernel_avx512_vnni.cc PROPERTIES
    COMPILE_OPTIONS "${JAX_GPTQ_AVX2_OPTIONS};-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;\
-mavx512vnni;-mprefer-vector-width=512")
endif()

add_library(jax_gptq_cpu_kernels OBJECT ${sources})
target_compile_definitions(jax_gptq_cpu_kernels PRIVATE ${JAX_GPTQ_KERNEL_DEFINITIONS})
target_compile_options(
  jax_gptq_cpu_kernels
  PRIVATE -ffp-contract=off  # every instruction set rounds the same operations in the same order
          -fno-math-errno -fno-trapping-math -Wall -Wextra
          -Wno-psabi  # wide vectors are passed within one file only
          -Wno-uninitialized -Wno-maybe-uninitialized)  # GCC 12 on its own AVX-512 headers
