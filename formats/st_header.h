/* The JSON header of a safetensors file, read by a scanner of its own: integers stay exact, names
 * of any length are handled, memory is a small multiple of the header, and nothing recurses.
 * Private to formats. */
#ifndef TMF_FORMATS_ST_HEADER_H
#define TMF_FORMATS_ST_HEADER_H

#include "base/tensor.h"

enum {
    ST_MAX_RANK = 8,
    ST_MAX_HEADER = 100000000, /* bytes, the format's own bound */
    ST_SHOWN = 96              /* room for a name as messages show it */
};

typedef struct {
    const char *name; /* in the pool, NUL-terminated UTF-8 */
    dtype dt;
    int ndim;
    int64_t shape[ST_MAX_RANK];
    uint64_t begin, end; /* bytes from the start of the data */
} st_item;

typedef struct {
    const char *key, *value;
} st_pair;

typedef struct {
    char *pool; /* all strings, unescaped */
    size_t pool_used;
    st_item *items; /* [n], by place in the data */
    int64_t n, cap;
    st_pair *meta; /* [n_meta], as they stand */
    int64_t n_meta, cap_meta;
    uint32_t *table;     /* [table_size] item index + 1, 0 empty; open addressing */
    uint64_t table_size; /* a power of two, 0 without items */
} st_header;

/* Parses and checks text[n], the header of a file whose data has data_bytes bytes. E_INPUT, or
 * E_UNSUPPORTED for what newer versions of the format allow, without the file's name. Fills h,
 * which st_header_free frees also after a failure. */
err_code st_header_parse(st_header *h, const char *text, size_t n, uint64_t data_bytes, err *e);
void st_header_free(st_header *h);
const st_item *st_header_find(const st_header *h, const char *name); /* NULL when absent */
/* A name as one line of a message shows it: control bytes as '?', long ones cut with "...". */
const char *st_shown(char buf[ST_SHOWN], const char *name);

#endif
