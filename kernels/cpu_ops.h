/* Entry points of the files that are compiled once per instruction set (see cpu.h). */
#ifndef TMF_KERNELS_CPU_OPS_H
#define TMF_KERNELS_CPU_OPS_H

#include "kernels/cpu.h"

err_code CPU_FN(gemm_cpu)(device *d, tensor *y, const tensor *x, const tensor *w,
                          const tensor *bias, bool add, err *e);
/* Overwrites the slots of the ops above. */
void CPU_FN(ops_fill)(op_table *t);

#endif
