/* Puts the CPU variants over the references, in rising order of instruction sets. */
#include "kernels/cpu.h"

#if defined(__x86_64__)
void ops_fill_avx2(op_table *t);
void ops_fill_avx512(op_table *t);

void ops_init_cpu(op_table *t, uint32_t cpu_flags)
{
    if (cpu_flags & CPU_AVX2) ops_fill_avx2(t);
    if (cpu_flags & CPU_AVX512) ops_fill_avx512(t);
}
#else
void ops_init_cpu(op_table *t, uint32_t cpu_flags)
{
    (void)t;
    (void)cpu_flags;
}
#endif
