/* Puts the CPU variants over the references, in rising order of instruction sets. */
#include "kernels/cpu.h"
#include "kernels/gemm_w4.h"

#if defined(__x86_64__)
void ops_fill_avx2(op_table *t);
void ops_fill_avx512(op_table *t);

/* Ops run one at a time: the largest need of any, whatever the variant. */
static size_t scratch_bytes_cpu(const device *d, const op_limits *l)
{
    const bool amx = d->cpu_flags & CPU_AMX;
    const size_t need[] = {gemm_w4_cpu_scratch(l),          attn_cpu_scratch_avx2(l),
                           attn_cpu_scratch_avx512(l),      product_cpu_scratch_avx2(l),
                           product_cpu_scratch_avx512(l),   amx ? gemm_amx_scratch(l) : 0,
                           amx ? product_amx_scratch(l) : 0};
    size_t most = 0;
    for (size_t i = 0; i < sizeof need / sizeof *need; i++) most = need[i] > most ? need[i] : most;
    return most;
}

static void fill_amx(op_table *t)
{
    t->gemm = gemm_amx;
    t->attn = attn_amx;
    t->gram = gram_amx;
    t->cross = product_cross_amx;
    t->quad = quad_amx;
    t->matmul = matmul_amx;
}

void ops_init_cpu(op_table *t, uint32_t cpu_flags)
{
    if (cpu_flags & CPU_AVX2) ops_fill_avx2(t);
    if (cpu_flags & CPU_AVX512) ops_fill_avx512(t);
    if (cpu_flags & CPU_AMX) fill_amx(t);
    if (cpu_flags & CPU_AVX2) {
        t->gemm_w4 = gemm_w4_cpu;
        t->scratch_bytes = scratch_bytes_cpu;
    }
}
#else
void ops_init_cpu(op_table *t, uint32_t cpu_flags)
{
    (void)t;
    (void)cpu_flags;
}
#endif
