/* A strict scanner for
 * {"name":{"dtype":..,"shape":[..],"data_offsets":[b,e]},..,"__metadata__":{..}}. It takes what the
 * published readers take and refuses what the format forbids although some of them let it pass: a
 * name twice, a gap, an overlap. Members of a tensor that it does not know are skipped. */
#include "formats/st_header.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/json.h"
#include "base/mem.h"

enum { ST_MAX_SKIP_DEPTH = 16 };

typedef struct {
    const char *text;
    size_t n, at;
    st_header *h;
    uint64_t data_bytes;
} scan;

const char *st_shown(char buf[ST_SHOWN], const char *name)
{
    size_t i = 0;
    for (; name[i] && i < ST_SHOWN - 4; i++) {
        const unsigned char c = (unsigned char)name[i];
        buf[i] = c < 0x20 || c == 0x7f ? '?' : (char)c;
    }
    if (name[i]) { /* do not cut a character of several bytes */
        while (i > 0 && ((unsigned char)name[i] & 0xc0) == 0x80) i--;
        memcpy(buf + i, "...", 4);
    } else {
        buf[i] = 0;
    }
    return buf;
}

/* ---- tokens ---- */
static err_code scan_fail(const scan *s, const char *expected, err *e)
{
    if (s->at >= s->n)
        return err_set(e, E_INPUT, "header: expected %s at byte %zu, got its end", expected, s->at);
    const unsigned char c = (unsigned char)s->text[s->at];
    if (c > 0x20 && c < 0x7f)
        return err_set(e, E_INPUT, "header: expected %s at byte %zu, got '%c'", expected, s->at, c);
    return err_set(e, E_INPUT, "header: expected %s at byte %zu, got byte 0x%02x", expected, s->at,
                   c);
}

static void scan_space(scan *s)
{
    while (s->at < s->n && strchr(" \t\r\n", s->text[s->at]) && s->text[s->at]) s->at++;
}

static bool scan_is(scan *s, char c)
{
    scan_space(s);
    if (s->at >= s->n || s->text[s->at] != c) return false;
    s->at++;
    return true;
}

static err_code scan_need(scan *s, char c, const char *expected, err *e)
{
    return scan_is(s, c) ? OK : scan_fail(s, expected, e);
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

static bool scan_hex4(scan *s, uint32_t *out)
{
    uint32_t v = 0;
    if (s->n - s->at < 4) return false;
    for (int i = 0; i < 4; i++) {
        const int d = hex_digit(s->text[s->at + (size_t)i]);
        if (d < 0) return false;
        v = v << 4 | (uint32_t)d;
    }
    s->at += 4;
    *out = v;
    return true;
}

static char *put_utf8(char *p, uint32_t c)
{
    if (c < 0x80) {
        *p++ = (char)c;
    } else if (c < 0x800) {
        *p++ = (char)(0xc0 | c >> 6);
        *p++ = (char)(0x80 | (c & 63));
    } else if (c < 0x10000) {
        *p++ = (char)(0xe0 | c >> 12);
        *p++ = (char)(0x80 | (c >> 6 & 63));
        *p++ = (char)(0x80 | (c & 63));
    } else {
        *p++ = (char)(0xf0 | c >> 18);
        *p++ = (char)(0x80 | (c >> 12 & 63));
        *p++ = (char)(0x80 | (c >> 6 & 63));
        *p++ = (char)(0x80 | (c & 63));
    }
    return p;
}

/* Behind "\u": one code point, from two escapes when it is a surrogate pair. NUL is refused: names
 * are C strings from here on. */
static bool scan_unicode(scan *s, char **p)
{
    uint32_t c, low;
    if (!scan_hex4(s, &c) || c == 0 || (c >= 0xdc00 && c <= 0xdfff)) return false;
    if (c >= 0xd800 && c <= 0xdbff) {
        if (s->n - s->at < 2 || s->text[s->at] != '\\' || s->text[s->at + 1] != 'u') return false;
        s->at += 2;
        if (!scan_hex4(s, &low) || low < 0xdc00 || low > 0xdfff) return false;
        c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
    }
    *p = put_utf8(*p, c);
    return true;
}

static bool scan_escape(scan *s, char **p)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    if (s->at >= s->n) return false;
    const char c = s->text[s->at++];
    if (c == 'u') return scan_unicode(s, p);
    const char *f = c ? strchr(from, c) : NULL;
    if (!f) return false;
    *(*p)++ = to[f - from];
    return true;
}

/* The pool has as many bytes as the header, and no string grows by unescaping: it cannot overflow.
 * */
static err_code scan_string(scan *s, const char **out, const char *expected, err *e)
{
    TRY(scan_need(s, '"', expected, e));
    char *p = s->h->pool + s->h->pool_used;
    *out = p;
    for (;;) {
        if (s->at >= s->n) return scan_fail(s, "the end of a string", e);
        const unsigned char c = (unsigned char)s->text[s->at];
        if (c < 0x20) return scan_fail(s, "a character of a string", e);
        s->at++;
        if (c == '"') break;
        if (c != '\\')
            *p++ = (char)c;
        else if (!scan_escape(s, &p))
            return scan_fail(s, "a valid escape before this place", e);
    }
    *p++ = 0;
    s->h->pool_used = (size_t)(p - s->h->pool);
    return OK;
}

/* A JSON integer from 0 to 2^63-1, no fraction, exponent or leading zero. */
static err_code scan_count(scan *s, int64_t *out, err *e)
{
    scan_space(s);
    const size_t from = s->at;
    int64_t v = 0;
    while (s->at < s->n && s->text[s->at] >= '0' && s->text[s->at] <= '9') {
        if (__builtin_mul_overflow(v, 10, &v) ||
            __builtin_add_overflow(v, s->text[s->at] - '0', &v))
            return err_set(e, E_INPUT, "header: the number at byte %zu is above 2^63", from);
        s->at++;
    }
    if (s->at == from) return scan_fail(s, "a whole number not below 0", e);
    if (s->text[from] == '0' && s->at - from > 1)
        return err_set(e, E_INPUT, "header: the number at byte %zu begins with 0", from);
    if (s->at < s->n && strchr(".eE", s->text[s->at]) && s->text[s->at])
        return err_set(e, E_INPUT, "header: the number at byte %zu is not whole", from);
    *out = v;
    return OK;
}

/* ---- unknown members are checked and stepped over ---- */
static size_t count_digits(const scan *s, size_t at)
{
    size_t n = 0;
    while (at + n < s->n && s->text[at + n] >= '0' && s->text[at + n] <= '9') n++;
    return n;
}

static bool next_is(const scan *s, size_t at, const char *set)
{
    return at < s->n && s->text[at] && strchr(set, s->text[at]);
}

/* Length of the JSON number at s->at, 0: none. */
static size_t number_length(const scan *s)
{
    size_t at = s->at, n;
    if (next_is(s, at, "-")) at++;
    if ((n = count_digits(s, at)) == 0 || (n > 1 && s->text[at] == '0')) return 0;
    at += n;
    if (next_is(s, at, ".")) {
        if ((n = count_digits(s, at + 1)) == 0) return 0;
        at += 1 + n;
    }
    if (next_is(s, at, "eE")) {
        at += next_is(s, at + 1, "+-") ? 2 : 1;
        if ((n = count_digits(s, at)) == 0) return 0;
        at += n;
    }
    return at - s->at;
}

static err_code skip_key(scan *s, err *e)
{
    const char *ignored;
    const size_t used = s->h->pool_used;
    TRY(scan_string(s, &ignored, "a key", e));
    s->h->pool_used = used;
    return scan_need(s, ':', "':'", e);
}

static err_code skip_scalar(scan *s, err *e)
{
    static const char *const words[] = {"null", "true", "false"};
    const char *ignored;
    scan_space(s);
    if (next_is(s, s->at, "\"")) {
        const size_t used = s->h->pool_used;
        TRY(scan_string(s, &ignored, "a string", e));
        s->h->pool_used = used;
        return OK;
    }
    size_t n = number_length(s);
    for (int i = 0; i < 3 && n == 0; i++) {
        const size_t len = strlen(words[i]);
        if (s->n - s->at >= len && memcmp(s->text + s->at, words[i], len) == 0) n = len;
    }
    s->at += n;
    return n ? OK : scan_fail(s, "a value", e);
}

static err_code skip_value(scan *s, err *e)
{
    char open[ST_MAX_SKIP_DEPTH];
    int depth = 0;
    for (;;) {
        const char c = scan_is(s, '{') ? '{' : scan_is(s, '[') ? '[' : 0;
        if (c) {
            if (depth == ST_MAX_SKIP_DEPTH)
                return err_set(e, E_INPUT, "header: nested deeper than %d at byte %zu",
                               ST_MAX_SKIP_DEPTH, s->at);
            open[depth++] = c;
            if (!scan_is(s, c == '{' ? '}' : ']')) {
                if (c == '{') TRY(skip_key(s, e));
                continue;
            }
            depth--;
        } else {
            TRY(skip_scalar(s, e));
        }
        while (depth > 0 && scan_is(s, open[depth - 1] == '{' ? '}' : ']')) depth--;
        if (depth == 0) return OK;
        TRY(scan_need(s, ',', "',' or a closing bracket", e));
        if (open[depth - 1] == '{') TRY(skip_key(s, e));
    }
}

/* ---- members of a tensor ---- */
static err_code grow(void **items, int64_t n, int64_t *cap, size_t size, err *e)
{
    void *bigger;
    if (n < *cap) return OK;
    const int64_t want = *cap ? *cap * 2 : 64;
    TRY(mem_alloc(&bigger, (size_t)want, size, "safetensors header", e));
    if (n) memcpy(bigger, *items, (size_t)n * size);
    mem_free(*items);
    *items = bigger;
    *cap = want;
    return OK;
}

static err_code scan_dtype(scan *s, st_item *t, err *e)
{
    static const char *const newer[] = {"F4",          "F6_E2M3",     "F6_E3M2", "F8_E8M0",
                                        "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64",     NULL};
    const size_t used = s->h->pool_used;
    const char *name;
    char shown[ST_SHOWN];
    TRY(scan_string(s, &name, "a dtype", e));
    s->h->pool_used = used; /* no need to keep it */
    if (dtype_from_name(&t->dt, name)) return OK;
    for (int i = 0; newer[i]; i++)
        if (strcmp(newer[i], name) == 0)
            return err_set(e, E_UNSUPPORTED, "dtype %s is not supported", name);
    return err_set(e, E_INPUT, "unknown dtype '%s'", st_shown(shown, name));
}

static err_code scan_shape(scan *s, st_item *t, err *e)
{
    t->ndim = 0;
    TRY(scan_need(s, '[', "'[' of a shape", e));
    if (scan_is(s, ']')) return OK;
    do {
        if (t->ndim == ST_MAX_RANK)
            return err_set(e, E_UNSUPPORTED, "more than %d dimensions", ST_MAX_RANK);
        TRY(scan_count(s, &t->shape[t->ndim++], e));
    } while (scan_is(s, ','));
    return scan_need(s, ']', "',' or ']' of a shape", e);
}

static err_code scan_offsets(scan *s, st_item *t, err *e)
{
    int64_t begin, end;
    TRY(scan_need(s, '[', "'[' of data_offsets", e));
    TRY(scan_count(s, &begin, e));
    TRY(scan_need(s, ',', "',' between data_offsets", e));
    TRY(scan_count(s, &end, e));
    TRY(scan_need(s, ']', "']' behind two data_offsets", e));
    t->begin = (uint64_t)begin;
    t->end = (uint64_t)end;
    return OK;
}

static err_code check_item(const scan *s, const st_item *t, err *e)
{
    int64_t count;
    TRY(tensor_count_checked(&count, t->ndim, t->shape, "shape", e));
    const uint64_t want = (uint64_t)count * dtype_bytes(t->dt);
    if (t->begin > t->end)
        return err_set(e, E_INPUT, "data_offsets [%llu,%llu] end before they begin",
                       (unsigned long long)t->begin, (unsigned long long)t->end);
    if (t->end > s->data_bytes)
        return err_set(e, E_INPUT,
                       "data_offsets [%llu,%llu] reach beyond the file's %llu bytes of data",
                       (unsigned long long)t->begin, (unsigned long long)t->end,
                       (unsigned long long)s->data_bytes);
    if (t->end - t->begin != want)
        return err_set(e, E_INPUT,
                       "shape and dtype make %llu bytes, data_offsets [%llu,%llu] hold %llu",
                       (unsigned long long)want, (unsigned long long)t->begin,
                       (unsigned long long)t->end, (unsigned long long)(t->end - t->begin));
    return OK;
}

static err_code scan_members(scan *s, st_item *t, err *e)
{
    static const char *const names[] = {"dtype", "shape", "data_offsets"};
    unsigned seen = 0;
    TRY(scan_need(s, '{', "'{' of a tensor", e));
    if (!scan_is(s, '}')) {
        do {
            const size_t used = s->h->pool_used;
            const char *key;
            TRY(scan_string(s, &key, "a member of a tensor", e));
            int which = 0;
            while (which < 3 && strcmp(names[which], key) != 0) which++;
            s->h->pool_used = used;
            TRY(scan_need(s, ':', "':'", e));
            if (which < 3 && seen & 1u << which)
                return err_set(e, E_INPUT, "%s stands there twice", names[which]);
            seen |= 1u << which;
            TRY(which == 0   ? scan_dtype(s, t, e)
                : which == 1 ? scan_shape(s, t, e)
                : which == 2 ? scan_offsets(s, t, e)
                             : skip_value(s, e));
        } while (scan_is(s, ','));
        TRY(scan_need(s, '}', "',' or '}' of a tensor", e));
    }
    for (int i = 0; i < 3; i++)
        if (!(seen & 1u << i)) return err_set(e, E_INPUT, "%s is missing", names[i]);
    return check_item(s, t, e);
}

static err_code scan_meta(scan *s, err *e)
{
    st_header *h = s->h;
    TRY(scan_need(s, '{', "'{' of __metadata__", e));
    if (scan_is(s, '}')) return OK;
    do {
        st_pair p;
        TRY(scan_string(s, &p.key, "a key", e));
        TRY(scan_need(s, ':', "':'", e));
        TRY(scan_string(s, &p.value, "a string as value", e));
        TRY(grow((void **)&h->meta, h->n_meta, &h->cap_meta, sizeof *h->meta, e));
        h->meta[h->n_meta++] = p;
    } while (scan_is(s, ','));
    return scan_need(s, '}', "',' or '}' of __metadata__", e);
}

static err_code scan_entry(scan *s, bool *had_meta, err *e)
{
    st_header *h = s->h;
    const char *name;
    char shown[ST_SHOWN];
    TRY(scan_string(s, &name, "the name of a tensor", e));
    TRY(scan_need(s, ':', "':'", e));
    if (strcmp(name, "__metadata__") == 0) {
        if (*had_meta) return err_set(e, E_INPUT, "__metadata__ stands there twice");
        *had_meta = true;
        if (scan_meta(s, e) != OK) return err_wrap(e, "__metadata__");
        return OK;
    }
    TRY(grow((void **)&h->items, h->n, &h->cap, sizeof *h->items, e));
    st_item *t = &h->items[h->n];
    memset(t, 0, sizeof *t);
    t->name = name;
    if (scan_members(s, t, e) != OK) return err_wrap(e, "tensor '%s'", st_shown(shown, name));
    h->n++;
    return OK;
}

/* ---- what only shows with all of them at hand ---- */
static int by_place(const void *a, const void *b)
{
    const st_item *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    if (x->end != y->end) return x->end < y->end ? -1 : 1;
    return strcmp(x->name, y->name);
}

static err_code check_cover(st_header *h, uint64_t data_bytes, err *e)
{
    uint64_t at = 0;
    char shown[ST_SHOWN];
    if (h->n) qsort(h->items, (size_t)h->n, sizeof *h->items, by_place);
    for (int64_t i = 0; i < h->n; i++) {
        const st_item *t = &h->items[i];
        if (t->begin != at)
            return err_set(
                e, E_INPUT, "tensor '%s': begins at byte %llu of the data, expected %llu (%s)",
                st_shown(shown, t->name), (unsigned long long)t->begin, (unsigned long long)at,
                t->begin < at ? "tensors overlap" : "a gap before it");
        at = t->end;
    }
    if (at != data_bytes)
        return err_set(e, E_INPUT, "the tensors end at byte %llu of the data, the file has %llu",
                       (unsigned long long)at, (unsigned long long)data_bytes);
    return OK;
}

static uint64_t slot_of(const st_header *h, const char *name)
{
    uint64_t i = XXH3_64bits(name, strlen(name)) & (h->table_size - 1);
    while (h->table[i] && strcmp(h->items[h->table[i] - 1].name, name) != 0)
        i = (i + 1) & (h->table_size - 1);
    return i;
}

static err_code build_table(st_header *h, err *e)
{
    char shown[ST_SHOWN];
    if (h->n == 0) return OK;
    for (h->table_size = 16; h->table_size < (uint64_t)h->n * 2;) h->table_size *= 2;
    TRY(mem_alloc((void **)&h->table, (size_t)h->table_size, sizeof *h->table, "safetensors names",
                  e));
    for (int64_t i = 0; i < h->n; i++) {
        const uint64_t at = slot_of(h, h->items[i].name);
        if (h->table[at])
            return err_set(e, E_INPUT, "tensor '%s' stands there twice",
                           st_shown(shown, h->items[i].name));
        h->table[at] = (uint32_t)i + 1;
    }
    return OK;
}

static int by_key(const void *a, const void *b)
{
    return strcmp(((const st_pair *)a)->key, ((const st_pair *)b)->key);
}

static err_code check_meta(st_header *h, err *e)
{
    char shown[ST_SHOWN];
    if (h->n_meta) qsort(h->meta, (size_t)h->n_meta, sizeof *h->meta, by_key);
    for (int64_t i = 1; i < h->n_meta; i++)
        if (strcmp(h->meta[i].key, h->meta[i - 1].key) == 0)
            return err_set(e, E_INPUT, "__metadata__: key '%s' stands there twice",
                           st_shown(shown, h->meta[i].key));
    return OK;
}

err_code st_header_parse(st_header *h, const char *text, size_t n, uint64_t data_bytes, err *e)
{
    scan s = {.text = text, .n = n, .h = h, .data_bytes = data_bytes};
    bool had_meta = false;
    memset(h, 0, sizeof *h);
    if (!json_utf8_valid(text, n)) return err_set(e, E_INPUT, "header: not valid UTF-8");
    if (n == 0 || text[0] != '{') return scan_fail(&s, "'{'", e);
    TRY(mem_alloc((void **)&h->pool, n + 1, 1, "safetensors header", e));
    s.at = 1;
    if (!scan_is(&s, '}')) {
        do {
            TRY(scan_entry(&s, &had_meta, e));
        } while (scan_is(&s, ','));
        TRY(scan_need(&s, '}', "',' or '}'", e));
    }
    scan_space(&s);
    if (s.at != n) return scan_fail(&s, "nothing but spaces behind the last '}'", e);
    TRY(check_cover(h, data_bytes, e));
    TRY(check_meta(h, e));
    return build_table(h, e);
}

void st_header_free(st_header *h)
{
    mem_free(h->table);
    mem_free(h->meta);
    mem_free(h->items);
    mem_free(h->pool);
    memset(h, 0, sizeof *h);
}

const st_item *st_header_find(const st_header *h, const char *name)
{
    if (h->n == 0) return NULL;
    const uint32_t at = h->table[slot_of(h, name)];
    return at ? &h->items[at - 1] : NULL;
}
