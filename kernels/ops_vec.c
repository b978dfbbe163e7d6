/* The ops of one vector instruction set, put into the table. */
#include "kernels/cpu_ops.h"

void CPU_FN(ops_fill)(op_table *t)
{
    t->embed = CPU_FN(embed_cpu);
    t->rmsnorm = CPU_FN(rmsnorm_cpu);
    t->add = CPU_FN(add_cpu);
    t->gemm = CPU_FN(gemm_cpu);
    t->glu = CPU_FN(glu_cpu);
    t->rope_kv = CPU_FN(rope_kv_cpu);
    t->attn = CPU_FN(attn_cpu);
    t->nll = CPU_FN(nll_cpu);
    t->absstat = CPU_FN(absstat_cpu);
    t->gram = CPU_FN(gram_cpu);
    t->cross = CPU_FN(product_cross);
    t->gram_finish = CPU_FN(gram_finish_cpu);
    t->quad = CPU_FN(quad_cpu);
    t->matmul = CPU_FN(matmul_cpu);
    t->product = CPU_FN(product_f32);
}
