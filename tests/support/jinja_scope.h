/* A scope out of a JSON object. */
#ifndef TMF_TESTS_JINJA_SCOPE_H
#define TMF_TESTS_JINJA_SCOPE_H

#include "formats/jinja.h"

/* Renders with the object's members as names, all data; *rc says how it went. */
static inline jinja_text jinja_with(const char *text, size_t n, const cJSON *context, int64_t now,
                                    err_code *rc, err *e)
{
    jinja_text out = {0};
    jinja_scope *s = NULL;
    jinja *t = NULL;
    jinja_value *v;
    const cJSON *o;
    *rc = jinja_open(&t, text, n, e);
    if (*rc == OK) *rc = jinja_scope_open(&s, e);
    if (*rc == OK && now) jinja_now(s, now);
    cJSON_ArrayForEach(o, context)
    {
        if (*rc == OK) *rc = jinja_cjson(s, &v, o, JINJA_DATA, e);
        if (*rc == OK) *rc = jinja_set(s, o->string, v, e);
    }
    if (*rc == OK) *rc = jinja_render(t, s, &out, e);
    jinja_scope_close(&s);
    jinja_close(&t);
    return out;
}

#endif
