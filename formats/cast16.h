/* The 16-bit parts of artifacts: the one place that decides what happens to values that the target
 * type does not hold. */
#ifndef TMF_FORMATS_CAST16_H
#define TMF_FORMATS_CAST16_H

#include "base/half.h"
#include "base/job.h"
#include "base/tensor.h"

/* Running judgement over the elements of one tensor. */
typedef struct {
    const char *what; /* names the tensor in errors */
    dtype to;         /* DT_F16 or DT_BF16 */
    bool clamp;       /* values beyond become the largest finite one, with a warning */
    int64_t beyond;
    float largest;
} cast16;

/* dst[i] = src[i] in the target type, src F32, F16 or BF16 and contiguous. NaN and infinity are
 * E_INPUT with their index `first + i`. Values beyond are counted and become the largest finite
 * one: cast16_end judges them. */
err_code cast16_run(cast16 *c, uint16_t *dst, const void *src, dtype from, int64_t first, int64_t n,
                    err *e);
/* E_INPUT with count and largest when some were beyond and clamp is off, else a warning to j. */
err_code cast16_end(const cast16 *c, const job *j, err *e);

/* Takes `count` elements from element `first` (row-major order of the tensor). */
typedef err_code (*cast16_sink)(void *ctx, int64_t first, const uint16_t *data, int64_t count,
                                err *e);
/* Streams a float tensor of 1 or 2 dimensions with contiguous rows through `buf` of CAST16_BYTES.
 * With clamp off and a value beyond, the sink gets nothing of its chunk and what follows. */
#define CAST16_BYTES ((size_t)256 << 10)
err_code cast16_tensor(const tensor *t, cast16 *c, void *buf, cast16_sink sink, void *ctx,
                       const job *j, err *e);

#endif
