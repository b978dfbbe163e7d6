/* Host memory. Blocks of 2 MiB and more are mapped on their own: they are zero without being
 * touched, may use huge pages, and go back to the system at once when freed, which keeps the stated
 * peaks true. */
#include "base/mem.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define MEM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define MEM_ASAN 1
#endif
#endif
#ifndef MEM_ASAN
#define MEM_ASAN 0
#endif

#define MEM_ALIGN ((size_t)64)
#define MEM_HUGE  ((size_t)2 << 20)
#define MEM_PAGE  ((size_t)4096)
#define MEM_MAGIC 0x746d666d656d3031u

/* Lies in the 64 bytes before every block. mapped is 0 for a block of malloc. */
typedef struct {
    uint64_t magic;
    size_t mapped;
    void *base;
} mem_head;

_Static_assert(sizeof(mem_head) <= 64, "the header fits in front of an aligned block");

err_code mem_mul(size_t *out, size_t a, size_t b, const char *what, err *e)
{
    if (__builtin_mul_overflow(a, b, out))
        return err_set(e, E_LIMIT, "%s: size overflows (%zu * %zu)", what, a, b);
    return OK;
}

err_code mem_add(size_t *out, size_t a, size_t b, const char *what, err *e)
{
    if (__builtin_add_overflow(a, b, out))
        return err_set(e, E_LIMIT, "%s: size overflows (%zu + %zu)", what, a, b);
    return OK;
}

static mem_head *mem_head_of(void *p) { return (mem_head *)(void *)((uint8_t *)p - MEM_ALIGN); }

/* The block begins on a 2 MiB boundary, its header in the page before it; the slack is unmapped. */
static void *mem_map(size_t bytes)
{
    const size_t len = (bytes + MEM_PAGE - 1) / MEM_PAGE * MEM_PAGE;
    const size_t all = len + MEM_HUGE + MEM_PAGE;
    uint8_t *m = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED) return NULL;
    const uintptr_t first = ((uintptr_t)m + MEM_PAGE + MEM_HUGE - 1) / MEM_HUGE * MEM_HUGE;
    uint8_t *p = m + (first - (uintptr_t)m), *base = p - MEM_PAGE;
    if (base > m) (void)munmap(m, (size_t)(base - m));
    const size_t tail = all - (size_t)(base - m) - MEM_PAGE - len;
    if (tail) (void)munmap(p + len, tail);
    (void)madvise(p, len, MADV_HUGEPAGE); /* a wish: kernels without huge pages say no */
    *mem_head_of(p) = (mem_head){MEM_MAGIC, MEM_PAGE + len, base};
    return p;
}

static void *mem_small(size_t bytes)
{
    void *base;
    if (posix_memalign(&base, MEM_ALIGN, bytes + MEM_ALIGN) != 0) return NULL;
    uint8_t *p = (uint8_t *)base + MEM_ALIGN;
    memset(base, 0, bytes + MEM_ALIGN);
    *mem_head_of(p) = (mem_head){MEM_MAGIC, 0, base};
    return p;
}

err_code mem_alloc(void **out, size_t n, size_t size, const char *what, err *e)
{
    size_t bytes;
    *out = NULL;
    TRY(mem_mul(&bytes, n, size, what, e));
    if (bytes == 0) return OK;
    if (bytes > PTRDIFF_MAX - 2 * MEM_HUGE)
        return err_set(e, E_NOMEM, "%s: cannot allocate %zu bytes", what, bytes);
    /* Under ASAN everything goes through malloc, so that overruns and leaks of large blocks are
     * seen. */
    *out = bytes >= MEM_HUGE && !MEM_ASAN ? mem_map(bytes) : mem_small(bytes);
    if (!*out) return err_set(e, E_NOMEM, "%s: cannot allocate %zu bytes", what, bytes);
    return OK;
}

void mem_free(void *p)
{
    if (!p) return;
    mem_head *h = mem_head_of(p);
    assert(h->magic == MEM_MAGIC);
    h->magic = 0; /* a second free is caught above */
    if (h->mapped)
        (void)munmap(h->base, h->mapped);
    else
        free(h->base);
}

err_code mem_strdup(char **out, const char *s, err *e)
{
    const size_t n = strlen(s) + 1;
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, n, 1, "string", e));
    memcpy(p, s, n);
    *out = p;
    return OK;
}

size_t arena_need(size_t bytes)
{
    if (bytes == 0) return 0;
    if (bytes > SIZE_MAX - 2 * MEM_ALIGN) return SIZE_MAX; /* arena_init refuses it */
    return (bytes + MEM_ALIGN - 1) / MEM_ALIGN * MEM_ALIGN + (MEM_ASAN ? MEM_ALIGN : 0);
}

static void arena_poison(arena *a)
{
#if MEM_ASAN
    if (a->base) ASAN_POISON_MEMORY_REGION(a->base, a->cap);
#else
    (void)a;
#endif
}

err_code arena_init(arena *a, size_t bytes, const char *what, err *e)
{
    void *p;
    *a = (arena){0};
    TRY(mem_alloc(&p, bytes, 1, what, e));
    *a = (arena){p, bytes, 0};
    arena_poison(a);
    return OK;
}

err_code arena_get(arena *a, void **out, size_t bytes, err *e)
{
    const size_t need = arena_need(bytes);
    *out = NULL;
    if (need > a->cap - a->used)
        return err_set(e, E_LIMIT, "arena: %zu bytes wanted, %zu of %zu left", bytes,
                       a->cap - a->used, a->cap);
    if (need == 0) return OK;
    *out = a->base + a->used;
    a->used += need;
#if MEM_ASAN
    ASAN_UNPOISON_MEMORY_REGION(*out,
                                bytes); /* what follows up to the next object stays poisoned */
#endif
    return OK;
}

void arena_reset(arena *a)
{
    a->used = 0;
    arena_poison(a);
}

void arena_free(arena *a)
{
#if MEM_ASAN
    if (a->base) ASAN_UNPOISON_MEMORY_REGION(a->base, a->cap);
#endif
    mem_free(a->base);
    *a = (arena){0};
}
