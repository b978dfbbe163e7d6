/* Views: they own nothing and do no arithmetic. Shapes are row-major, slowest dimension first;
 * strides count elements. */
#ifndef TMF_BASE_TENSOR_H
#define TMF_BASE_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef enum {
    DT_NONE = 0,
    DT_F64,
    DT_F32,
    DT_F16,
    DT_BF16,
    DT_I64,
    DT_I32,
    DT_I16,
    DT_I8,
    DT_U64,
    DT_U32,
    DT_U16,
    DT_U8,
    DT_BOOL,
    DT_F8_E4M3,
    DT_F8_E5M2,
    DT_COUNT
} dtype;
typedef enum { MEM_HOST = 0, MEM_CUDA } memspace;

#define TENSOR_MAX_DIMS 4

typedef struct {
    void *data;
    dtype dt;
    memspace mem;
    int ndim;
    int64_t shape[TENSOR_MAX_DIMS], stride[TENSOR_MAX_DIMS];
} tensor;

size_t dtype_bytes(dtype dt);
const char *dtype_name(dtype dt); /* safetensors spelling: "F16", "BF16", "I32" ... */
bool dtype_from_name(dtype *out, const char *name); /* the same spelling back */

tensor tensor_of(void *data, dtype dt, int ndim, const int64_t *shape); /* host, contiguous */
tensor tensor_1d(void *data, dtype dt, int64_t n);
tensor tensor_2d(void *data, dtype dt, int64_t rows, int64_t cols);
/* Rows [from, from+n) of dimension 0; columns [from, from+n) of the last dimension. */
tensor tensor_rows(const tensor *t, int64_t from, int64_t n);
tensor tensor_cols(const tensor *t, int64_t from, int64_t n);
bool tensor_contiguous(const tensor *t);
int64_t tensor_count(const tensor *t); /* elements */
size_t tensor_bytes(const tensor *t);  /* bytes when contiguous */
err_code tensor_count_checked(int64_t *count, int ndim, const int64_t *shape, const char *what,
                              err *e);
/* E_SHAPE "<what>: expected F16 [32,4096], got F16 [32,2048]"; a shape entry of -1 matches
 * anything. */
err_code tensor_expect(const tensor *t, const char *what, dtype dt, int ndim, const int64_t *shape,
                       err *e);
void tensor_describe(char *buf, size_t cap, const tensor *t);
/* Any float dtype to f32 and back (f16: round to nearest even, beyond 65504 becomes infinity).
 * Strides honoured; shapes must agree (assert). Returns how many finite values became infinite. */
int64_t tensor_convert(tensor *dst, const tensor *src);

#endif
