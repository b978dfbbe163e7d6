/* w4_dump PATH: every linear of every block as f16, for a comparison outside of this project. On
 * standard output, for each: a line "LAYER ROLE N K", then n rows of k f16 values, bias not
 * included. */
#include <stdio.h>

#include "base/half.h"
#include "base/mem.h"
#include "formats/weights.h"

static void put_row(const float *row, f16 *out, int64_t k)
{
    for (int64_t i = 0; i < k; i++) out[i] = f32_to_f16(row[i]);
    (void)fwrite(out, 2, (size_t)k, stdout);
}

static err_code dump_linear(weight_src *s, tensor_role r, int32_t layer, float *row, f16 *out,
                            err *e)
{
    linear_view v;
    TRY(weights_linear(s, r, layer, -1, &v, e));
    const int64_t n = v.w4 ? v.q.n : v.dense.shape[0], k = v.w4 ? v.q.k : v.dense.shape[1];
    (void)printf("%d %s %lld %lld\n", layer, role_name(r), (long long)n, (long long)k);
    for (int64_t i = 0; i < n; i++) {
        if (v.w4) {
            w4_dequant_row(row, &v.q, i);
        } else {
            tensor to = tensor_2d(row, DT_F32, 1, k);
            const tensor from = tensor_rows(&v.dense, i, 1);
            (void)tensor_convert(&to, &from);
        }
        put_row(row, out, k);
    }
    return OK;
}

static err_code dump(weight_src *s, err *e)
{
    const model_desc *m = weights_desc(s);
    tensor_role linears[7];
    const int n = model_block_linears(m, linears);
    float *row;
    f16 *out;
    err_code rc = OK;
    TRY(mem_alloc((void **)&row, MODEL_MAX_WIDTH, sizeof *row, "row", e));
    TRY(mem_alloc((void **)&out, MODEL_MAX_WIDTH, sizeof *out, "row", e));
    for (int32_t l = 0; rc == OK && l < m->layers; l++)
        for (int i = 0; rc == OK && i < n; i++) rc = dump_linear(s, linears[i], l, row, out, e);
    mem_free(out);
    mem_free(row);
    return rc;
}

int main(int argc, char **argv)
{
    weight_src *s = NULL;
    err e = {OK, ""};
    if (argc != 2) return fprintf(stderr, "usage: w4_dump PATH\n"), 2;
    err_code rc = weights_open(&s, argv[1], &e);
    if (rc == OK) rc = dump(s, &e);
    weights_close(&s);
    if (rc != OK) fprintf(stderr, "w4_dump: %s\n", e.msg);
    return rc != OK || fflush(stdout) != 0;
}
