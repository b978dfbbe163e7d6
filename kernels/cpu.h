/* Names of the functions that are compiled once per instruction set: CPU_FN(gemm_cpu) is
 * gemm_cpu_avx2, gemm_cpu_avx512 or gemm_cpu_amx by the flags of the object library (CMakeLists.txt
 * sets CPU_SUFFIX). */
#ifndef TMF_KERNELS_CPU_H
#define TMF_KERNELS_CPU_H

#include "kernels/device_internal.h"

#define CPU_PASTE_(a, b) a##_##b
#define CPU_PASTE(a, b)  CPU_PASTE_(a, b)
#define CPU_FN(name)     CPU_PASTE(name, CPU_SUFFIX)

/* Shared scratch that the CPU variants need; ops_cpu.c takes the largest. */
size_t attn_cpu_scratch_avx2(const op_limits *l);
size_t attn_cpu_scratch_avx512(const op_limits *l);
size_t product_cpu_scratch_avx2(const op_limits *l);
size_t product_cpu_scratch_avx512(const op_limits *l);
size_t gemm_amx_scratch(const op_limits *l);
size_t product_amx_scratch(const op_limits *l);

/* Products of up to this many rows with weights other than bf16, and attention of sequences with up
 * to this many rows, take the vector kernels on a CPU with AMX as well: memory limits there, and
 * the tiles would stay mostly empty. On a deterministic device all products take the tiles, all of
 * attention the vectors. */
#define AMX_VECTOR_ROWS 4
err_code gemm_cpu_avx512(device *d, tensor *y, const tensor *x, const tensor *w, const tensor *bias,
                         bool add, err *e);
err_code gemm_amx(device *d, tensor *y, const tensor *x, const tensor *w, const tensor *bias,
                  bool add, err *e);
err_code attn_cpu_few_avx512(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                             const batch_rows *rows, float scale, int32_t window, int32_t limit,
                             err *e);
err_code attn_amx(device *d, tensor *y, const tensor *q, const kv_layer *kv, const batch_rows *rows,
                  float scale, int32_t window, err *e);
err_code gram_amx(device *d, tensor *h, const tensor *x, err *e);
err_code product_cross_amx(device *d, tensor *y, const tensor *a, const tensor *b, err *e);
err_code quad_amx(device *d, tensor *out, const tensor *x, const tensor *h, err *e);
err_code matmul_amx(device *d, tensor *y, const tensor *a, const tensor *b, err *e);

#endif
