# W4 products on the CPU: plain C, and one file for each instruction set.
set(KERNELS_W4_C gemm_w4_ref.c gemm_w4_cpu.c w4_upload_cpu.c)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|amd64|AMD64")
    list(APPEND KERNELS_W4_C gemm_w4_avx2.c gemm_w4_avx512.c gemm_w4_amx.c)
    set_source_files_properties(gemm_w4_avx2.c PROPERTIES COMPILE_OPTIONS "${KERNELS_AVX2_FLAGS}")
    set_source_files_properties(gemm_w4_avx512.c PROPERTIES
        COMPILE_OPTIONS "${KERNELS_AVX512_FLAGS};-mavx512vnni")
    set_source_files_properties(gemm_w4_amx.c PROPERTIES COMPILE_OPTIONS "${KERNELS_AMX_FLAGS}")
endif()
