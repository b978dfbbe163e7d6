/* Puts the CPU variants over the references, in rising order of instruction sets. */
#include "kernels/cpu.h"
#include "kernels/gemm_w4.h"

#if defined(__x86_64__)
void ops_fill_avx2(op_table *t);
void ops_fill_avx512(op_table *t);

static size_t scratch_bytes_cpu(const device *d, const op_limits *l)
{
    (void)d;
    return gemm_w4_cpu_scratch(l);
}

void ops_init_cpu(op_table *t, uint32_t cpu_flags)
{
    if (cpu_flags & CPU_AVX2) {
        ops_fill_avx2(t);
        t->gemm_w4 = gemm_w4_cpu;
        t->scratch_bytes = scratch_bytes_cpu;
    }
    if (cpu_flags & CPU_AVX512) ops_fill_avx512(t);
}
#else
void ops_init_cpu(op_table *t, uint32_t cpu_flags)
{
    (void)t;
    (void)cpu_flags;
}
#endif
