/* The op table of CUDA devices. */
#include "kernels/device_cuda.cuh"

extern "C" {
#include "kernels/search_ops.h"

static size_t scratch_cuda(const device *d, const op_limits *lim)
{
    size_t most = attn_scratch_cuda(d, lim);
    const size_t w4 = gemm_w4_scratch_cuda(d, lim), quad = (size_t)lim->k * sizeof(float),
                 sample = sample_scratch_cuda(lim);
    if (w4 > most) most = w4;
    if (quad > most) most = quad;
    if (sample > most) most = sample;
    return ((most + 127) & ~(size_t)127) + cuda_planes_bytes(lim->k) + 128;
}

void ops_init_cuda(op_table *t, int32_t sm)
{
    (void)sm; /* variants by capability are chosen inside the ops */
    t->embed = embed_cuda;
    t->rmsnorm = rmsnorm_cuda;
    t->add = add_cuda;
    t->gemm = gemm_cuda;
    t->gemm_w4 = gemm_w4_cuda;
    t->norm_gemm_w4 = gemm_w4_norm_cuda;
    t->rope_attn = rope_attn_cuda;
    t->glu = glu_cuda;
    t->rope_kv = rope_kv_cuda;
    t->attn = attn_cuda;
    t->nll = nll_cuda;
    t->absstat = absstat_cuda;
    t->gram = gram_cuda;
    t->gram_finish = gram_finish_cuda;
    t->quad = quad_cuda;
    t->matmul = matmul_cuda;
    t->sample = sample_cuda;
    t->w4_upload = w4_upload_cuda;
    t->w4_upload_bytes = w4_upload_bytes_cuda;
    t->scratch_bytes = scratch_cuda;
    t->search = &search_ops_cuda;
}

} /* extern "C" */
