/* What the two halves of the conversion share: convert.c decides and files, convert_data.c makes
 * bytes. */
#ifndef TMF_FORMATS_CONVERT_INTERNAL_H
#define TMF_FORMATS_CONVERT_INTERNAL_H

#include "base/job.h"
#include "formats/convert.h"

#define CONVERT_BAND_BYTES ((size_t)8 << 20) /* of the finished rows that are made at once */

/* Where finished bytes go: begin names the file (of convert_files), end closes it. */
typedef struct {
    err_code (*begin)(void *ctx, const tm_file *f, err *e);
    err_code (*write)(void *ctx, const void *data, size_t n, err *e);
    err_code (*end)(void *ctx, err *e);
    void *ctx;
} convert_sink;

struct convert {
    weight_src *src;
    const job *j;
    convert_opts o;
    model_desc m; /* of the source */
    tm_config c;  /* of the result */
    tm_file *files;
    size_t n;
    char options[512]; /* canonical, for the manifest */
};

/* Makes the files [first, first + count) of convert_files, which belong together: one tensor, or
 * the qweight, scales and zeros of one linear. */
size_t convert_unit(const convert *c, size_t first); /* how many belong together from there */
err_code convert_make(convert *c, size_t first, const convert_sink *sink, err *e);
size_t convert_make_bytes(const convert *c); /* what convert_make allocates at most */

#endif
