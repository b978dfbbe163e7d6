/* name.call(key="value", ...), as the tools that a model was trained with are called. */
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/toolcall_internal.h"

static size_t word(const char *p)
{
    size_t n = 0;
    while ((p[n] >= 'a' && p[n] <= 'z') || (p[n] >= 'A' && p[n] <= 'Z') || p[n] == '_' ||
           (n && p[n] >= '0' && p[n] <= '9'))
        n++;
    return n;
}

static err_code code_args(const char *p, toolcall_buf *out, bool *ok, err *e)
{
    TRY(toolcall_buf_add(out, "{", 1, e));
    while (*p && *p != ')') {
        const size_t n = word(p);
        if (!n || p[n] != '=' || p[n + 1] != '"') return OK;
        size_t k = n + 2;
        while (p[k] && p[k] != '"') k += p[k] == '\\' && p[k + 1] ? 2 : 1;
        if (!p[k]) return OK;
        if (out->n > 1) TRY(toolcall_buf_add(out, ", ", 2, e));
        TRY(toolcall_buf_add(out, "\"", 1, e));
        TRY(toolcall_buf_add(out, p, n, e));
        TRY(toolcall_buf_add(out, "\": ", 3, e));
        TRY(toolcall_buf_add(out, p + n + 1, k - n, e));
        p += k + 1;
        while (*p == ',' || *p == ' ') p++;
    }
    TRY(toolcall_buf_add(out, "}", 1, e));
    *ok = *p == ')';
    for (p += *ok; toolcall_is_space(*p);) p++;
    *ok = *ok && !*p;
    return OK;
}

err_code toolcall_run_code(toolcall *t)
{
    toolcall_buf args = {0};
    const size_t n = t->in.n ? word(t->in.p) : 0;
    bool ok = false;
    err_code rc = OK;
    if (n && n <= TOOLCALL_MAX_NAME && !strncmp(t->in.p + n, ".call(", 6))
        rc = code_args(t->in.p + n + 6, &args, &ok, t->e);
    if (rc == OK && ok) {
        cJSON *o = NULL;
        err ignored;
        ok = json_parse(&o, args.p, args.n, "arguments", &ignored) == OK;
        cJSON_Delete(o);
    }
    if (rc == OK && ok) {
        memcpy(t->name, t->in.p, n);
        t->name[n] = '\0';
        rc = toolcall_call_begin(t);
        if (rc == OK) rc = toolcall_tell(t, TOOLCALL_ARGS, args.p, args.n);
    } else if (rc == OK) {
        rc = toolcall_buf_add(&t->back, t->in.p, t->in.n, t->e);
        if (rc == OK) rc = toolcall_give_back(t);
    }
    toolcall_buf_drop(&t->in, t->in.n);
    mem_free(args.p);
    return rc;
}
