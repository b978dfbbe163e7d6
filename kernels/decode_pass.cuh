/* A whole decode pass of one sequence as one kernel: products of one row and decode attention in
 * turn. One block a multiprocessor walks the steps, each block as far as what it reads is there,
 * while the stream of weights runs on into the steps to come, because weights depend on nothing.
 * Private to kernels/. */
#ifndef TMF_KERNELS_DECODE_PASS_CUH
#define TMF_KERNELS_DECODE_PASS_CUH

#include "kernels/attn_decode.cuh"
#include "kernels/gemm_w4.cuh"

#define DECODE_PASS_STEPS 384 /* kernel parameters hold so many */
#define DECODE_PASS_GROUP 128

typedef struct {
    const uint8_t *data; /* weights in our tiling; attention: the layer's cache */
    const void *extra;   /* bias or NULL; attention: the cache's scales and zeros */
    const void *x;       /* f16 [k], or with `norm` the residual stream f32 [k] */
    const void *norm;    /* or NULL */
    void *y;
    int32_t n, k; /* attention: window in n */
    float eps;
    int16_t first; /* tile of block 0: steps begin where the one before ended */
    uint8_t norm_dt;
    uint8_t attn : 1, paired : 1, glu : 1, add : 1, wide : 1;
    int8_t in, held; /* steps back to the one that made x, or what y holds; 0: memory */
    bool single;     /* of f16 in the exchange: one a word, exact */
    bool quiet;      /* a later step writes over y: only the exchange is written */
} decode_step;

/* Steps hand their results on as fresh words, whose bit 0 says whether they are written: an f32
 * less its last bit, two f16 of which the first is rounded to 10 bits, or, for attention, one
 * f16. So no barrier stands between a step and the next, and data is its own announcement. Step i
 * writes slot i % 5, and the bit alternates with each use of a slot; no step reads what is 4 or
 * more back, and a block writes in a step when all have left the step before the last. Of two
 * sets a launch uses one and clears the other. */
#define DECODE_PASS_SLOTS      5
#define DECODE_PASS_BACK       3
#define DECODE_PASS_SLOT_WORDS 16384
#define DECODE_PASS_SET_WORDS  (DECODE_PASS_SLOTS * DECODE_PASS_SLOT_WORDS + DECODE_PASS_STEPS)

typedef struct {
    attn_decode_call attn; /* of every layer but for its cache and window */
    int32_t *launches;     /* [2]: warps that ended, zero before and after; launches so far */
    uint32_t *exchange; /* [2][DECODE_PASS_SET_WORDS] zero at first: slots, warps behind a step */
    int32_t n, stages, attn_items;
    int32_t row_bytes, steps_at; /* of the shared memory behind the ring: the row, then what
                                  * attention needs, then at steps_at a copy of the steps */
    decode_step steps[DECODE_PASS_STEPS];
} decode_pass;

/* Bytes of shared memory beside the ring of weights and the steps: of a product's row of so many
 * units, and of attention. */
int decode_pass_row_bytes(int units);
int decode_pass_attn_bytes(int head_dim, int group);
/* Whether a step of so many inputs leaves room for a ring of four places beside all else, with as
 * many steps as there may be. */
bool decode_pass_fits(int64_t k);
/* head_dim 64 or 128 and bits as in attn_decode; attn_bytes: 0 without attention; p->row_bytes: the
 * most that any product needs; stages and steps_at are set here. */
cudaError_t decode_pass_run(decode_pass *p, int head_dim, int bits, int attn_bytes, int sms,
                            cudaStream_t stream);

#endif
