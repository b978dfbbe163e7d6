/* While a decode pass of one row is recorded, its products and attention are gathered and become
 * one kernel (decode_pass.cuh) when the recording ends or any other op comes between. */
#include <string.h>

#include "kernels/decode_pass.cuh"
#include "kernels/device_cuda.cuh"

struct cuda_pass {
    decode_pass call;
    bool open, has_attn;
    int head_dim, bits, next_tile;
    int32_t words[DECODE_PASS_SLOTS]; /* what steps leave in a slot, always as many */
    struct {
        const uint8_t *from, *to;
    } made[DECODE_PASS_STEPS]; /* the memory that a step writes */
};

err_code cuda_pass_make(device *d, err *e)
{
    void *mem;
    if (cuda_of(d)->sm != 90) return OK;
    TRY(mem_alloc(&mem, 1, sizeof(cuda_pass), "decode pass", e));
    cuda_of(d)->pass = (cuda_pass *)mem;
    return OK;
}

void cuda_pass_begin(device *d)
{
    if (cuda_of(d)->pass) cuda_of(d)->pass->open = true;
}

bool cuda_pass_open(const device *d) { return cuda_of(d)->pass && cuda_of(d)->pass->open; }

static void forget(cuda_pass *p)
{
    p->call.n = 0;
    p->call.attn_items = p->call.row_bytes = 0;
    p->has_attn = false;
    memset(p->words, 0, sizeof p->words);
    p->head_dim = p->bits = p->next_tile = 0;
}

void cuda_pass_end(device *d)
{
    cuda_pass *p = cuda_of(d)->pass;
    if (!p) return;
    p->open = false;
    forget(p);
}

err_code cuda_pass_flush(device *d, err *e)
{
    const cuda_state *s = cuda_of(d);
    cuda_pass *p = s->pass;
    if (!p || !p->call.n) return OK;
    static_assert(CUDA_PASS_WORDS == 16 + 2 * DECODE_PASS_SET_WORDS, "exchange");
    p->call.launches = s->counters + CUDA_COUNTERS;
    p->call.exchange = (uint32_t *)p->call.launches + 16;
    for (int i = 0; i < p->call.n; i++)
        for (int j = i + 1; j < p->call.n; j++)
            if (p->made[j].from == p->made[i].from && p->made[j].to >= p->made[i].to)
                p->call.steps[i].quiet = true;
    const int attn = p->has_attn ? decode_pass_attn_bytes(p->head_dim, p->call.attn.group) : 0;
    const cudaError_t rc = decode_pass_run(&p->call, p->has_attn ? p->head_dim : 64,
                                           p->has_attn ? p->bits : 16, attn, s->sms, s->stream);
    forget(p);
    return cuda_launched(d, "decode pass", rc, e);
}

err_code cuda_pass_stop(device *d, err *e)
{
    TRY(cuda_pass_flush(d, e));
    if (cuda_of(d)->pass) cuda_of(d)->pass->open = false;
    return OK;
}

/* Which step made what lies at from..to: *back steps ago, 0 none of the pass. False: not as a step
 * left it, or too long ago. */
static bool made_by(const cuda_pass *p, const void *from, size_t bytes, int *back)
{
    const uint8_t *lo = (const uint8_t *)from, *hi = lo + bytes;
    *back = 0;
    for (int i = p->call.n - 1; i >= 0; i--) {
        if (p->made[i].to <= lo || p->made[i].from >= hi) continue;
        *back = p->call.n - i;
        return p->made[i].from == lo && p->made[i].to >= hi && *back <= DECODE_PASS_BACK;
    }
    return true;
}

/* The next step of the pass, zeroed, or NULL when no pass is recorded: it writes `n` values of
 * `size` bytes at y, and reads as many bytes at x and, with `add`, what y holds. */
static err_code next_step(device *d, decode_step **out, const void *x, size_t x_bytes, void *y,
                          int64_t n, int size, bool add, err *e)
{
    cuda_pass *p = cuda_of(d)->pass;
    const int64_t words = n * size / 4;
    int in, held = 0;
    *out = NULL;
    if (!p || !p->open || words > DECODE_PASS_SLOT_WORDS || n % 4) return OK;
    int32_t *had = &p->words[p->call.n % DECODE_PASS_SLOTS];
    if (!made_by(p, x, x_bytes, &in) || (add && !made_by(p, y, (size_t)(n * size), &held)) ||
        p->call.n == DECODE_PASS_STEPS || (*had && *had != words)) {
        TRY(cuda_pass_flush(d, e));
        in = held = 0, had = &p->words[0];
    }
    *had = (int32_t)words;
    p->made[p->call.n].from = (const uint8_t *)y;
    p->made[p->call.n].to = (const uint8_t *)y + n * size;
    *out = &p->call.steps[p->call.n++];
    memset(*out, 0, sizeof **out);
    (*out)->in = (int8_t)in, (*out)->held = (int8_t)held;
    return OK;
}

err_code cuda_pass_product(device *d, const w4_tiles *w, const w4_one_call *c, bool *taken, err *e)
{
    const int sms = cuda_of(d)->sms;
    decode_step *s;
    *taken = false;
    if (w->group != DECODE_PASS_GROUP || !decode_pass_fits(w->k)) return OK;
    TRY(next_step(d, &s, c->x ? (const void *)c->x : (const void *)c->resid,
                  (size_t)w->k * (c->x ? 2 : 4), c->y, c->glu ? w->n / 2 : w->n, c->wide ? 4 : 2,
                  c->add, e));
    if (!s) return OK;
    cuda_pass *p = cuda_of(d)->pass;
    s->data = w->data, s->extra = w->bias;
    s->x = c->x ? (const void *)c->x : (const void *)c->resid, s->norm = c->x ? NULL : c->norm;
    s->norm_dt = (uint8_t)c->norm_dt, s->eps = c->eps;
    s->y = c->y, s->n = w->n, s->k = w->k;
    s->paired = w->paired, s->glu = c->glu, s->add = c->add, s->wide = c->wide;
    s->first = (int16_t)p->next_tile;
    p->next_tile = (p->next_tile + w->tiles) % sms;
    const int bytes = decode_pass_row_bytes(w->units);
    if (bytes > p->call.row_bytes) p->call.row_bytes = bytes;
    *taken = true;
    return OK;
}

/* What all layers have in common. */
static attn_decode_call common(const attn_decode_call *c)
{
    attn_decode_call a;
    memcpy(&a, c, sizeof a); /* padding too: the copies are compared */
    a.data = NULL, a.param = NULL, a.window = 0;
    a.rope.data = NULL, a.rope.param = NULL;
    return a;
}

/* Whether a lane may load its channels of a vector at once and finds their partners in one. */
static bool vectors_fit(const rope_call *r)
{
    const uintptr_t all = (uintptr_t)r->q | (uintptr_t)r->k | (uintptr_t)r->v;
    return all % 16 == 0 && r->dims % 8 == 0 &&
           (r->q_head | r->q_sub | r->k_head | r->v_head) % 8 == 0;
}

err_code cuda_pass_attn(device *d, const attn_decode_call *c, int head_dim, int bits, bool *taken,
                        err *e)
{
    cuda_pass *p = cuda_of(d)->pass;
    decode_step *s;
    *taken = false;
    if (!p || !p->open || c->seqs != 1 || !c->fused || c->planes.planes ||
        (head_dim != 64 && head_dim != 128) || !vectors_fit(&c->rope))
        return OK;
    const attn_decode_call a = common(c);
    if (p->has_attn &&
        (p->head_dim != head_dim || p->bits != bits || memcmp(&a, &p->call.attn, sizeof a) != 0))
        TRY(cuda_pass_flush(d, e));
    if (p->call.n && p->call.steps[p->call.n - 1].n > DECODE_PASS_SLOT_WORDS)
        TRY(cuda_pass_flush(d, e)); /* its results cannot lie one a word */
    const __half *first = c->rope.q,
                 *last = c->rope.v + (c->kv_heads - 1) * c->rope.v_head + head_dim;
    TRY(next_step(d, &s, first, (size_t)((const uint8_t *)last - (const uint8_t *)first), c->y,
                  (int64_t)c->kv_heads * c->group * head_dim, 2, false, e));
    if (!s) return OK;
    if (s->in) p->call.steps[p->call.n - 1 - s->in].single = true;
    p->has_attn = true, p->head_dim = head_dim, p->bits = bits;
    memcpy(&p->call.attn, &a, sizeof a);
    p->call.attn_items = c->splits * c->kv_heads * ((c->group + 7) / 8);
    s->attn = 1;
    s->data = c->data, s->extra = c->param, s->n = c->window;
    *taken = true;
    return OK;
}
