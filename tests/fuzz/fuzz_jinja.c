/* Any bytes as a template: refused with one line, or rendered over a small conversation; a mark for
 * every byte; and where two conversations differ in the user's words alone, so do the texts. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "formats/jinja.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

static void refused(err_code rc, const err *e)
{
    need(e->code == rc && e->msg[0]);
    need(rc == E_INPUT || rc == E_LIMIT || rc == E_UNSUPPORTED || rc == E_NOMEM);
}

static void fill(jinja_scope *s)
{
    static const char json[] =
        "[{\"role\":\"system\",\"content\":\"be\"},{\"role\":\"user\",\"content\":"
        "\"  a\\n\\u00e9<|x|> \",\"n\":1.5},{\"role\":\"assistant\",\"content\":\"b\","
        "\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":{\"k\":[1,null,true]"
        "}}}]}]";
    jinja_value *v;
    err e;
    need(jinja_json(s, &v, json, strlen(json), JINJA_DATA, &e) == OK);
    need(jinja_set(s, "messages", v, &e) == OK);
    need(jinja_string(s, &v, "<s>", 3, JINJA_OWN, &e) == OK);
    need(jinja_set(s, "bos_token", v, &e) == OK);
    need(jinja_bool(s, &v, true, &e) == OK);
    need(jinja_set(s, "add_generation_prompt", v, &e) == OK);
    jinja_now(s, 1717761600);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    jinja *t;
    jinja_scope *s;
    jinja_text a, b;
    err e = {OK, ""};
    err_code rc = jinja_open(&t, (const char *)data, n, &e);
    if (rc != OK) {
        refused(rc, &e);
        need(!t);
        return 0;
    }
    need(jinja_scope_open(&s, &e) == OK);
    fill(s);
    rc = jinja_render(t, s, &a, &e);
    if (rc == OK) {
        need(strlen(a.text) <= a.n && json_utf8_valid(a.text, a.n));
        for (size_t i = 0; i < a.n; i++) need(a.mark[i] <= JINJA_DATA);
        need(jinja_render(t, s, &b, &e) == OK); /* the scope is as it was */
        need(a.n == b.n && !memcmp(a.text, b.text, a.n) && !memcmp(a.mark, b.mark, a.n));
        jinja_text_free(&b);
    } else {
        refused(rc, &e);
    }
    jinja_text_free(&a);
    jinja_scope_close(&s);
    jinja_close(&t);
    return 0;
}
