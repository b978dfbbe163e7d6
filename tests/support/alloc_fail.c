#include "support/alloc_fail.h"

#include "base/file.h"
#include "base/mem.h"

static long left;
static bool reached;

err_code __real_mem_alloc(void **out, size_t n, size_t size, const char *what, err *e);
err_code __wrap_mem_alloc(void **out, size_t n, size_t size, const char *what, err *e);
err_code __real_mem_strdup(char **out, const char *s, err *e);
err_code __wrap_mem_strdup(char **out, const char *s, err *e);
err_code __real_file_map_open(file_map *m, const char *path, err *e);
err_code __wrap_file_map_open(file_map *m, const char *path, err *e);

void alloc_fail_at(long n)
{
    left = n;
    reached = false;
}

bool alloc_failed(void) { return reached; }

static bool fails(void)
{
    if (left == 0 || --left) return false;
    reached = true;
    return true;
}

err_code __wrap_mem_alloc(void **out, size_t n, size_t size, const char *what, err *e)
{
    *out = NULL;
    return fails() ? err_set(e, E_NOMEM, "%s: test", what)
                   : __real_mem_alloc(out, n, size, what, e);
}

err_code __wrap_mem_strdup(char **out, const char *s, err *e)
{
    *out = NULL;
    return fails() ? err_set(e, E_NOMEM, "test") : __real_mem_strdup(out, s, e);
}

err_code __wrap_file_map_open(file_map *m, const char *path, err *e)
{
    *m = (file_map){0};
    return fails() ? err_set(e, E_NOMEM, "%s: test", path) : __real_file_map_open(m, path, e);
}
