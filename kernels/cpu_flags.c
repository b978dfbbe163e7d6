/* CPU features, as far as both the processor and the system allow them. */
#include <string.h>

#include "kernels/device_internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The kernel hands out the 8 KB of tile state on request, once per process. */
static bool amx_permitted(void)
{
    const long arch_req_xcomp_perm = 0x1023, xfeature_tiledata = 18;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_tiledata) == 0;
}

static bool amx_present(void)
{
    const unsigned tile_int8_bf16 = 1u << 24 | 1u << 25 | 1u << 22;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return (d & tile_int8_bf16) == tile_int8_bf16;
}

static bool avxvnni_present(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    return (a & 1u << 4) != 0;
}

static bool avx512_present(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static bool f16c_present(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
}

static uint32_t flags_of_machine(uint32_t allowed)
{
    uint32_t f = 0;
    __builtin_cpu_init();
    /* The builtin also asks the system whether it saves the registers. */
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !f16c_present())
        return 0;
    f |= CPU_AVX2;
    if (avxvnni_present()) f |= CPU_AVXVNNI;
    if (avx512_present()) {
        f |= CPU_AVX512;
        if (__builtin_cpu_supports("avx512vnni")) f |= CPU_AVX512VNNI;
        if (__builtin_cpu_supports("avx512bf16")) f |= CPU_AVX512BF16;
    }
    const uint32_t base = CPU_AVX512 | CPU_AVX512VNNI | CPU_AVX512BF16;
    if ((allowed & CPU_AMX) && (f & base) == base && amx_present() && amx_permitted()) f |= CPU_AMX;
    return f & allowed;
}
#else
static uint32_t flags_of_machine(uint32_t allowed)
{
    (void)allowed;
    return 0;
}
#endif

err_code cpu_flags_get(uint32_t *flags, const char *isa, err *e)
{
    const uint32_t avx2 = CPU_AVX2;
    const uint32_t avx512 = avx2 | CPU_AVXVNNI | CPU_AVX512 | CPU_AVX512VNNI | CPU_AVX512BF16;
    const struct {
        const char *name;
        uint32_t allowed;
    } bound[] = {{"auto", avx512 | CPU_AMX},
                 {"amx", avx512 | CPU_AMX},
                 {"avx512", avx512},
                 {"avx2", avx2},
                 {"ref", 0}};
    for (size_t i = 0; i < sizeof bound / sizeof *bound; i++) {
        if (strcmp(isa ? isa : "auto", bound[i].name) == 0) {
            *flags = flags_of_machine(bound[i].allowed);
            return OK;
        }
    }
    return err_set(e, E_USAGE, "instruction set '%s': expected auto, ref, avx2, avx512 or amx",
                   isa);
}

const char *cpu_flags_name(uint32_t flags)
{
    if (flags & CPU_AMX) return "amx";
    if (flags & CPU_AVX512VNNI) return "avx512-vnni";
    if (flags & CPU_AVX512) return "avx512";
    if (flags & CPU_AVX2) return "avx2";
    return "ref";
}
