/* Entry points of the files that are compiled once per instruction set (see cpu.h). */
#ifndef TMF_KERNELS_CPU_OPS_H
#define TMF_KERNELS_CPU_OPS_H

#include "kernels/cpu.h"

err_code CPU_FN(embed_cpu)(device *d, tensor *y, const tensor *table, const tensor *ids, err *e);
err_code CPU_FN(rmsnorm_cpu)(device *d, tensor *y, const tensor *x, const tensor *w, float eps,
                             err *e);
err_code CPU_FN(add_cpu)(device *d, tensor *y, const tensor *x, err *e);
err_code CPU_FN(gemm_cpu)(device *d, tensor *y, const tensor *x, const tensor *w,
                          const tensor *bias, bool add, err *e);
err_code CPU_FN(glu_cpu)(device *d, tensor *y, const tensor *gate, const tensor *up, err *e);
err_code CPU_FN(rope_kv_cpu)(device *d, tensor *q, tensor *k, const tensor *v, const rope_spec *r,
                             const batch_rows *rows, const kv_layer *kv, err *e);
err_code CPU_FN(attn_cpu)(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                          const batch_rows *rows, float scale, int32_t window, err *e);
/* Only the sequences with at most `limit` rows in this step. */
err_code CPU_FN(attn_cpu_few)(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                              const batch_rows *rows, float scale, int32_t window, int32_t limit,
                              err *e);
err_code CPU_FN(nll_cpu)(device *d, tensor *nll, tensor *argmax, const tensor *logits,
                         const tensor *target, err *e);
err_code CPU_FN(absstat_cpu)(device *d, tensor *absmax, tensor *abssum, const tensor *x, err *e);
err_code CPU_FN(gram_cpu)(device *d, tensor *h, const tensor *x, err *e);
err_code CPU_FN(product_cross)(device *d, tensor *y, const tensor *a, const tensor *b, err *e);
err_code CPU_FN(gram_finish_cpu)(device *d, tensor *h, err *e);
err_code CPU_FN(quad_cpu)(device *d, tensor *out, const tensor *x, const tensor *h, err *e);
err_code CPU_FN(matmul_cpu)(device *d, tensor *y, const tensor *a, const tensor *b, err *e);
err_code CPU_FN(product_f32)(device *d, tensor *y, float alpha, const tensor *a, const tensor *b,
                             bool add, err *e);
/* Overwrites the slots of the ops above. */
void CPU_FN(ops_fill)(op_table *t);

#endif
