/* The ops of one vector instruction set, put into the table. */
#include "kernels/cpu_ops.h"

void CPU_FN(ops_fill)(op_table *t)
{
    t->gemm = CPU_FN(gemm_cpu);
}
