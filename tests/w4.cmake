# W4 products: the unit test, and a timer of whole models' linears (not a test).
tmf_test(gemm_w4 unit tmf_kernels)
add_executable(bench_w4 bench_w4.c)
target_link_libraries(bench_w4 PRIVATE tmf_flags tmf_kernels)
# Products and attention of a GPU alone (scripts/gpu-check.sh kernels).
add_executable(bench_cuda bench_cuda.c)
target_link_libraries(bench_cuda PRIVATE tmf_flags tmf_kernels)
