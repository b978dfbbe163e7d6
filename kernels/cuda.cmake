# The CUDA backend: C with templates; only extern "C" leaves these files.
set(CUDA_ARCHS "90a" CACHE STRING "compute capabilities to build for, without sm_: 90a is measured")
target_sources(tmf_kernels PRIVATE device_cuda.cu device_cuda_pass.cu device_cuda_load.cu device_cuda_move.cu decode_pass.cu ops_cuda.cu rows.cu
    gemm.cu gemm_one.cu gemm_w4.cu gemm_w4_few.cu gemm_w4_cluster.cu gemm_w4_one.cu gemm_w4_wgmma.cu
    gemm_fixed.cu attn_fixed.cu sample.cu search.cu search_range.cu search_solve.cu search_round.cu search_fold.cu
    rope_kv.cu attn.cu attn_decode.cu attn_prefill.cu attn_prefill_wgmma.cu nll.cu)
target_compile_definitions(tmf_kernels PRIVATE TMF_CUDA)
target_link_libraries(tmf_kernels PUBLIC CUDA::cudart_static CUDA::cublas)
set_target_properties(tmf_kernels PROPERTIES CUDA_STANDARD 17 CUDA_ARCHITECTURES "${CUDA_ARCHS}")
