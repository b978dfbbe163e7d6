/* 4-bit weights: a view with a layout tag, and host conversion between layouts.
 * W[n][k] = (q[n][k] - zero[n][k/group]) * scale[n][k/group]; q in 0..15.
 * Layouts (turbomind-format: AWQ 1.2, GPTQ 1.3, TurboMind epoch A 2.4 and C 2.7):
 *   W4_CODES  q u8 [n,k] one code a byte; scales f16 [n,k/g]; zeros u8 [n,k/g]
 *   W4_AWQ    q i32 [k,n/8] nibble p of word w = column 8w+{0,2,4,6,1,3,5,7}[p];
 *             zeros i32 [k/g,n/8] same order; scales f16 [k/g,n]
 *   W4_GPTQ   q i32 [k/8,n] nibble p = row 8r+p; zeros i32 [k/g,n/8] sequential, zero-1; scales f16
 * [k/g,n] W4_TM     q u32 [k,n/8] sequential nibbles; scales f16 [k/g,n]; zeros f16 [k/g,n]  (epoch
 * C) W4_TM_A   q u32 tiled 32x32; scales: u32 [k/g,n] = f16 scale << 16 | f16 (64+zero); zeros
 * unused (epoch A) W4_DEVICE the private tiling of the device that made it (kernels/ops.h); never
 * on disk */
#ifndef TMF_BASE_W4_H
#define TMF_BASE_W4_H

#include "base/half.h"
#include "base/pool.h"
#include "base/tensor.h"

typedef enum { W4_CODES, W4_AWQ, W4_GPTQ, W4_TM, W4_TM_A, W4_DEVICE } w4_layout;

typedef struct {
    tensor q, scales, zeros;
    tensor bias; /* f16, bf16 or f32 [n]; data NULL when absent */
    int64_t k, n;
    int32_t group;
    w4_layout layout;
    bool paired; /* W4_DEVICE alone: the device keeps row i beside row n/2 + i (gate and up) */
} w4_weight;

const char *w4_layout_name(w4_layout l);
/* Checks dtypes and shapes of every part against k, n, group and layout; `what` names the linear.
 */
err_code w4_check(const w4_weight *w, const char *what, err *e);
/* Bytes of q, scales and zeros in a layout. E_SHAPE when k % group or n % 8 (or tiles) do not allow
 * it. */
err_code w4_sizes(size_t *q, size_t *scales, size_t *zeros, int64_t k, int64_t n, int32_t group,
                  w4_layout layout, err *e);
/* Fills dst's buffers (allocated by the caller by w4_sizes, shapes set by w4_shape) from src; any
 * of the on-disk layouts to any. E_UNSUPPORTED when a zero is not an integer in the target's range.
 */
void w4_shape(w4_weight *w, int64_t k, int64_t n, int32_t group, w4_layout layout);
err_code w4_repack(w4_weight *dst, const w4_weight *src, err *e);
/* The same on the threads of a pool; NULL: on this one. */
err_code w4_repack_on(w4_weight *dst, const w4_weight *src, pool *workers, err *e);
/* View of inputs [from, from+count), without the bias: both multiples of the group, and of the
 * layout's unit (8 for W4_GPTQ, 32 for W4_TM_A). */
w4_weight w4_inputs(const w4_weight *w, int64_t from, int64_t count);
/* Codes of rows [k0,k0+rows) and columns [n0,n0+cols) as W4_TM's sequential words:
 * out[k-k0][(n-n0)/8], nibble n%8. k0 and n0 are multiples of the block, cols of 8. Any on-disk
 * layout; the reader of device tilings. */
enum { W4_BLOCK_K = 64, W4_BLOCK_N = 256 };
void w4_read_block(uint32_t out[W4_BLOCK_K][W4_BLOCK_N / 8], const w4_weight *w, int64_t k0,
                   int rows, int64_t n0, int cols);
f16 w4_scale(const w4_weight *w, int64_t n, int64_t group);
float w4_zero(const w4_weight *w, int64_t n, int64_t group);
/* One row n as f32 (no f16 rounding): out[k]. Any on-disk layout. */
void w4_dequant_row(float *out, const w4_weight *w, int64_t row);
/* Code and zero of one place, for tests and compare. */
int w4_code(const w4_weight *w, int64_t n, int64_t k);

#endif
