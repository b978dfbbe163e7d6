/* The part of Jinja2 that chat templates use, as the transformers library sets it up (trim_blocks,
 * lstrip_blocks, loopcontrols, its tojson, raise_exception, strftime_now, the generation tag).
 * Bounded: template bytes, nodes, nesting, steps, memory and output have limits; nothing is read
 * from outside. Every output byte knows whether the template or the data wrote it. */
#ifndef TMF_FORMATS_JINJA_H
#define TMF_FORMATS_JINJA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/json.h"

#define JINJA_MAX_TEMPLATE ((size_t)1 << 20)
#define JINJA_MAX_NODES    100000
#define JINJA_MAX_DEPTH    100     /* nested blocks and expressions; values in values */
#define JINJA_MAX_STEPS    4000000 /* nodes evaluated by one rendering, items copied */
#define JINJA_MAX_MEMORY   ((size_t)256 << 20)
#define JINJA_MAX_OUTPUT   ((size_t)64 << 20)

typedef struct jinja jinja;
/* E_INPUT "line N: ..." for what is not Jinja, E_UNSUPPORTED for what is, but not of this part
 * (include, import, extends); E_LIMIT. The text is copied. */
err_code jinja_open(jinja **out, const char *text, size_t n, err *e);
void jinja_close(jinja **t); /* NULL accepted */

/* What the template sees. Values live as long as their scope. */
typedef struct jinja_scope jinja_scope;
typedef struct jinja_value jinja_value;
/* Who wrote a string's bytes: 0 the template's side; others are the caller's to choose, and mixed
 * or converted values keep them byte by byte. Bytes made from data in other ways (numbers, quotes
 * around keys) are JINJA_DATA. */
enum { JINJA_OWN = 0, JINJA_DATA = 1 };
err_code jinja_scope_open(jinja_scope **out, err *e);
void jinja_scope_close(jinja_scope **s); /* NULL accepted */
err_code jinja_string(jinja_scope *s, jinja_value **out, const char *p, size_t n, uint8_t mark,
                      err *e);
err_code jinja_bool(jinja_scope *s, jinja_value **out, bool b, err *e);
err_code jinja_none(jinja_scope *s, jinja_value **out, err *e);
/* JSON as Python's json.loads reads it (1 and 1.0 differ, NaN is refused); E_INPUT. */
err_code jinja_json(jinja_scope *s, jinja_value **out, const char *text, size_t n, uint8_t mark,
                    err *e);
/* The same from parsed JSON; whole numbers are integers. */
err_code jinja_cjson(jinja_scope *s, jinja_value **out, const cJSON *o, uint8_t mark, err *e);
err_code jinja_list(jinja_scope *s, jinja_value **out, err *e);
err_code jinja_list_add(jinja_scope *s, jinja_value *list, jinja_value *v, err *e);
err_code jinja_map(jinja_scope *s, jinja_value **out, err *e);
/* key is copied; an existing one is replaced. */
err_code jinja_map_set(jinja_scope *s, jinja_value *map, const char *key, jinja_value *v, err *e);
/* A name that the template can use. */
err_code jinja_set(jinja_scope *s, const char *name, jinja_value *v, err *e);
/* The second that strftime_now knows (UTC); without this call it is not defined. */
void jinja_now(jinja_scope *s, int64_t seconds);

typedef struct {
    char *text;    /* NUL-terminated */
    uint8_t *mark; /* [n] who wrote each byte */
    size_t n;
} jinja_text; /* zero-init; free with jinja_text_free */
/* Renders once; the scope's values are not changed. E_INPUT "line N: ..." for an error of the
 * template, the text of raise_exception as it is; E_LIMIT; thread-safe on a shared template. */
err_code jinja_render(const jinja *t, jinja_scope *s, jinja_text *out, err *e);
void jinja_text_free(jinja_text *t);

#endif
