/* Fills the table with the references: complete, and right on any CPU. */
#include "kernels/gemm_w4.h"
#include "kernels/ref.h"
#include "kernels/search_ops.h"

static size_t scratch_bytes_ref(const device *d, const op_limits *l)
{
    (void)d;
    (void)l;
    return 0;
}

void ops_init_ref(op_table *t)
{
    *t = (op_table){
        .embed = embed_ref,
        .rmsnorm = rmsnorm_ref,
        .add = add_ref,
        .gemm = gemm_ref,
        .gemm_w4 = gemm_w4_ref,
        .w4_upload = w4_upload_cpu,
        .w4_upload_bytes = w4_upload_bytes_cpu,
        .glu = glu_ref,
        .rope_kv = rope_kv_ref,
        .attn = attn_ref,
        .nll = nll_ref,
        .absstat = absstat_ref,
        .gram = gram_ref,
        .gram_finish = gram_finish_ref,
        .quad = quad_ref,
        .matmul = matmul_ref,
        .product = product_ref,
        .scratch_bytes = scratch_bytes_ref,
        .search = &search_ops_ref,
    };
}
