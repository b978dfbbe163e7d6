/* y (+)= x deq(w) + bias on the CPU's tiling: w = (code - zero) * scale in f32, sums in double. */
#include "kernels/gemm_w4.h"
#include "kernels/ref.h"

static int tile_code(const uint8_t *codes, int64_t k, int lane)
{
    const uint8_t b = codes[(k / 8 * W4_TILE_N + lane) * 4 + k % 4];
    return k % 8 < 4 ? b & 15 : b >> 4;
}

static float tile_zero(const w4_tiles *w, const uint8_t *tile, int32_t g, int lane)
{
    if (w->zeros_f16) return f16_to_f32(((const f16 *)(tile + w->zeros_at))[g * W4_TILE_N + lane]);
    return (float)(tile[w->zeros_at + (size_t)g * 8 + (size_t)(lane / 2)] >> 4 * (lane % 2) & 15);
}

static double dot(const w4_tiles *w, const float *x, int64_t n)
{
    const uint8_t *tile = w->base + (size_t)(n / W4_TILE_N) * w->tile_bytes;
    const int lane = (int)(n % W4_TILE_N);
    double sum = 0.0;
    for (int32_t g = 0; g < w->groups; g++) {
        const float scale = f16_to_f32(((const f16 *)tile)[g * W4_TILE_N + lane]);
        const float zero = tile_zero(w, tile, g, lane);
        for (int64_t k = (int64_t)g * w->group; k < (int64_t)(g + 1) * w->group; k++) {
            const float q = (float)tile_code(tile + w->codes_at, k, lane);
            sum += (double)x[k] * ((q - zero) * scale);
        }
    }
    return sum;
}

err_code gemm_w4_ref(device *d, tensor *y, const tensor *x, const w4_weight *weight, bool add,
                     err *e)
{
    const w4_tiles w = w4_tiles_of(weight);
    const tensor *bias = &weight->bias;
    (void)d;
    (void)e;
    for (int64_t i = 0; i < y->shape[0]; i++) {
        const float *in = ref_row_f32(x, i);
        float *out = ref_row_f32(y, i);
        for (int64_t n = 0; n < w.n; n++) {
            double sum = dot(&w, in, n);
            if (bias->data) sum += ref_load(bias->data, bias->dt, n);
            out[n] = (float)(add ? out[n] + sum : sum);
        }
    }
    return OK;
}
