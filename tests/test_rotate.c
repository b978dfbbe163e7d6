/* Models in other bases: the same function, what the bases of keys and values are, and a model with
 * outlier channels, which ends where the one without them does. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "awq/kv_turn.h"
#include "awq/pack.h"
#include "awq/rotate.h"
#include "base/mem.h"
#include "formats/weights_mem.h"
#include "tests/support/awq_case.h"
#include "tests/support/outliers.h"
#include "tests/support/suite.h"
#include "tests/support/tiny_weights.h"

static double uniform(uint64_t *x)
{
    *x = *x * 6364136223846793005u + 1442695040888963407u;
    return (double)(*x >> 33) / 2147483648. * 2 - 1;
}

static void fill(float *v, int64_t n, uint64_t *x)
{
    for (int64_t i = 0; i < n; i++) v[i] = (float)uniform(x);
}

/* ---- the same function ---- */

/* Turns of every layer: angles anywhere, matrices near the identity. */
static void random_turns(const model_desc *m, block_plan *p, uint64_t seed, int kinds)
{
    *p = plan_shape(m, 32);
    if (kinds & 1) {
        p->turn_k.data = malloc(tensor_bytes(&p->turn_k));
        fill(p->turn_k.data, tensor_count(&p->turn_k), &seed);
    }
    if (kinds & 2) {
        const int64_t hd = m->head_dim;
        float *v = malloc(tensor_bytes(&p->turn_v));
        fill(v, tensor_count(&p->turn_v), &seed);
        for (int64_t i = 0; i < tensor_count(&p->turn_v); i++) v[i] *= 0.5f / sqrtf((float)hd);
        for (int64_t i = 0; i < p->turn_v.shape[0]; i++) v[i * hd + i % hd] += 1;
        p->turn_v.data = v;
    }
}

/* The turned model written out, since a source holds one layer's turns at a time. */
static weight_src *written(weight_src *src, int kinds)
{
    const model_desc *base = weights_desc(src);
    const int64_t n = base->hidden;
    rotated *x = NULL;
    weights_mem *w = NULL;
    weight_src *out = NULL;
    err e;
    float *q = malloc((size_t)(n * n) * sizeof *q);
    rotate_random(q, n, 5);
    const tensor residual = tensor_2d(kinds & 4 ? q : NULL, DT_F32, n, n);
    MUST(rotated_open(&x, src, dev, &residual, &e));
    free(q);
    weight_src *t = rotated_src(x);
    model_desc m = *weights_desc(t);
    ck_assert(m.tied_embed == (base->tied_embed && !(kinds & 4)));
    m.dt = DT_F32;
    MUST(weights_mem_open(&w, &m, &e));
    static const tensor_role whole[] = {ROLE_EMBED, ROLE_FINAL_NORM, ROLE_HEAD};
    tensor view;
    for (int i = 0; i < (m.tied_embed ? 2 : 3); i++) {
        MUST(weights_tensor(t, whole[i], -1, &view, &e));
        MUST(weights_mem_tensor(w, whole[i], -1, &view, &e));
    }
    for (int32_t l = 0; l < m.layers; l++) {
        block_plan p;
        random_turns(&m, &p, 9u + (uint64_t)l, kinds);
        MUST(rotated_layer(x, l, &p, &e));
        for (int i = 0; i < 2; i++) {
            MUST(weights_tensor(t, i ? ROLE_FFN_NORM : ROLE_ATTN_NORM, l, &view, &e));
            MUST(weights_mem_tensor(w, i ? ROLE_FFN_NORM : ROLE_ATTN_NORM, l, &view, &e));
        }
        for (int i = 0; i < p.n_linears; i++) {
            linear_view v;
            MUST(weights_linear(t, p.linear[i].role, l, -1, &v, &e));
            MUST(weights_mem_linear(w, p.linear[i].role, l, &v, &e));
        }
        free(p.turn_k.data);
        free(p.turn_v.data);
    }
    rotated_close(&x);
    MUST(weights_mem_source(&out, &w, &e));
    return out;
}

/* Largest differences of the logits and of the weights of layer 0, over the largest there are. */
static double apart(weight_src *a, weight_src *b)
{
    const int64_t n = (int64_t)SEQLEN * weights_desc(a)->vocab;
    double *x = malloc((size_t)n * sizeof *x), *y = malloc((size_t)n * sizeof *y), most = 0,
           size = 0;
    tiny_forward(x, a, ids, SEQLEN, NULL, NULL);
    tiny_forward(y, b, ids, SEQLEN, NULL, NULL);
    for (int64_t i = 0; i < n; i++) {
        most = fmax(most, fabs(x[i] - y[i]));
        size = fmax(size, fabs(x[i]));
    }
    free(x);
    free(y);
    return most / size;
}

/* Keys and values alone, the stream alone, all: grouped-query and multi-head, fused and split, with
 * biases, tied. What remains is that the cache rounds other numbers to f16. */
START_TEST(same_function)
{
    model_desc forms[4] = {tiny_llama(), tiny_internlm2(), tiny_qwen2(), tiny_llama()};
    forms[1].heads = 4;
    forms[1].kv_heads = 2;
    forms[1].head_dim = forms[1].rope_dims = 64;
    forms[3].kv_heads = forms[3].heads;
    forms[3].o_bias = true;
    const tiny_opts o = {.desc = forms[_i / 4], .seed = 3};
    const int kinds[] = {1, 2, 4, 7};
    weight_src *src = NULL;
    err e;
    MUST(tiny_open(&src, &o, &e));
    weight_src *changed = written(src, kinds[_i % 4]);
    const double by = apart(src, changed);
    ck_assert_msg(by < 0.01, "logits differ by %g", by);
    linear_view a, b;
    const tensor_role r = o.desc.qkv == QKV_SPLIT ? kinds[_i % 4] == 2 ? ROLE_V : ROLE_K : ROLE_QKV;
    MUST(weights_linear(src, r, 0, -1, &a, &e));
    MUST(weights_linear(changed, r, 0, -1, &b, &e));
    float *wide = malloc((size_t)tensor_count(&a.dense) * sizeof *wide);
    tensor f = tensor_2d(wide, DT_F32, a.dense.shape[0], a.dense.shape[1]);
    tensor_convert(&f, &a.dense);
    double moved = 0;
    for (int64_t i = 0; i < tensor_count(&f); i++)
        moved = fmax(moved, fabs((double)wide[i] - ((float *)b.dense.data)[i]));
    ck_assert_msg(moved > 0.05, "weights moved by %g", moved);
    free(wide);
    weights_close(&changed);
    weights_close(&src);
}
END_TEST

START_TEST(not_a_basis)
{
    const tiny_opts o = {.desc = tiny_llama(), .seed = 3};
    const int64_t n = o.desc.hidden;
    weight_src *src = NULL;
    rotated *x = NULL;
    err e;
    MUST(tiny_open(&src, &o, &e));
    float *q = malloc((size_t)(n * n) * sizeof *q);
    rotate_random(q, n, 1);
    tensor r = tensor_2d(q, DT_F32, n, n);
    q[n + 3] += 0.1f;
    ck_assert_int_eq(rotated_open(&x, src, dev, &r, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "expected orthogonal rows") != NULL, "%s", e.msg);
    r.shape[0] = n / 2;
    ck_assert_int_eq(rotated_open(&x, src, dev, &r, &e), E_INPUT);
    ck_assert_ptr_null(x);
    r.data = NULL;
    MUST(rotated_open(&x, src, dev, &r, &e));
    block_plan p;
    random_turns(&o.desc, &p, 1, 2);
    memset(p.turn_v.data, 0, (size_t)o.desc.head_dim * sizeof(float));
    ck_assert_int_eq(rotated_layer(x, 0, &p, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "layer 0: turn of v: head 0") != NULL, "%s", e.msg);
    free(p.turn_v.data);
    free(q);
    rotated_close(&x);
    weights_close(&src);
}
END_TEST

/* ---- bases ---- */

/* a^T s a and its trace with everything double: a [n,n]. */
static double trace_of(const float *a, const float *s, int64_t n, bool turned)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t u = 0; u < n; u++)
            for (int64_t v = 0; v < n; v++)
                sum += (double)(turned ? a[i * n + u] : a[u * n + i]) * s[u * n + v] *
                       (turned ? a[i * n + v] : a[v * n + i]);
    return sum;
}

/* Sums of outer products of random vectors with channels of very different size. */
static void random_square(float *s, int64_t n, double spread, uint64_t seed)
{
    float *v = malloc((size_t)n * sizeof *v);
    memset(s, 0, (size_t)(n * n) * sizeof *s);
    for (int t = 0; t < 200; t++) {
        fill(v, n, &seed);
        for (int64_t i = 0; i < n; i++) v[i] *= (float)exp(spread * (double)(i % 7 - 3));
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++) s[i * n + j] += v[i] * v[j];
    }
    free(v);
}

START_TEST(matrix_of_values)
{
    enum { N = 24 };
    static float c[N * N], g[N * N], m[N * N], back[N * N], other[N * N], zero[N * N];
    double *work = malloc((size_t)kv_turn_work(N) * sizeof *work);
    uint64_t seed = 4;
    random_square(c, N, 0.8, 1);
    random_square(g, N, -0.5, 2);
    ck_assert(kv_turn_matrix(c, g, N, m, back, work));
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            double sum = 0;
            for (int k = 0; k < N; k++) sum += (double)m[i * N + k] * back[k * N + j];
            ck_assert_double_eq_tol(sum, i == j, 1e-4);
        }
    const double mine = trace_of(m, c, N, false) * trace_of(back, g, N, true);
    memset(other, 0, sizeof other);
    for (int i = 0; i < N; i++) other[i * N + i] = 1;
    ck_assert(mine < 0.5 * trace_of(other, c, N, false) * trace_of(other, g, N, true));
    for (int i = 0; i < 20; i++) { /* no neighbour does better: M (1 + small), (1 - small) M^-1 */
        float near_m[N * N], near_back[N * N], d[N * N];
        fill(d, N * N, &seed);
        for (int r = 0; r < N; r++)
            for (int k = 0; k < N; k++) {
                double a = m[r * N + k], b = back[r * N + k];
                for (int u = 0; u < N; u++) {
                    a += 0.003 * m[r * N + u] * d[u * N + k];
                    b -= 0.003 * d[r * N + u] * back[u * N + k];
                }
                near_m[r * N + k] = (float)a;
                near_back[r * N + k] = (float)b;
            }
        ck_assert(mine < 1.001 * trace_of(near_m, c, N, false) * trace_of(near_back, g, N, true));
    }
    ck_assert(!kv_turn_matrix(zero, g, N, m, back, work));
    free(work);
}
END_TEST

/* A pair that keeps its place points to both sides alike; scores stay. */
START_TEST(angles_of_keys)
{
    const model_desc m = small(tiny_llama());
    enum { T = 50 };
    const int64_t hd = m.head_dim;
    float k[T * 64], q[64], angle[32];
    double score[T];
    uint64_t seed = 8;
    ck_assert(hd <= 64);
    fill(k, T * hd, &seed);
    fill(q, hd, &seed);
    for (int t = 0; t < T; t++) {
        k[t * hd + 1] -= 7; /* pair 1: dims 1 and 1 + half */
        k[t * hd + 1 + hd / 2] += 2;
    }
    for (int t = 0; t < T; t++) {
        score[t] = 0;
        for (int64_t i = 0; i < hd; i++) score[t] += (double)k[t * hd + i] * q[i];
    }
    kv_turn_angles(&m, k, T, angle);
    ck_assert(angle[0] == 0 && angle[1] != 0);
    kv_turn_pairs(&m, k, T, angle);
    kv_turn_pairs(&m, q, 1, angle);
    double a = 0, b = 0;
    for (int t = 0; t < T; t++) {
        double s = 0;
        for (int64_t i = 0; i < hd; i++) s += (double)k[t * hd + i] * q[i];
        ck_assert_double_eq_tol(s, score[t], 1e-4);
        a += k[t * hd + 1];
        b += k[t * hd + 1 + hd / 2];
    }
    ck_assert_double_eq_tol(a, b, 1e-2);
    ck_assert(a > 4 * T);
}
END_TEST

/* ---- outlier channels ---- */

static double distance(const float *a, const float *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    return sum;
}

typedef struct {
    double rtn, best, kv4, folded, turned; /* squared errors of logits */
} damage;

static void pack(bool dense)
{
    const pack_opts p = {.model_dir = model_dir,
                         .plan_path = plan_path,
                         .out_dir = awq_dir,
                         .dense = dense,
                         .force = true};
    pack_summary done;
    err e;
    MUST(pack_run(&done, dev, &p, NULL, &e));
}

static void quantize(const char *method, bool turn, bool dense)
{
    search_opts o = options(method, NULL);
    search_summary s;
    err e;
    o.rotate = turn ? "vo" : NULL;
    MUST(search_run(&s, dev, &o, NULL, &e));
    pack(dense);
}

/* Of AWQ's directory, against `want` [n]. */
static double damage_of(kv_format kv, const float *want, float *have, int64_t n)
{
    last_logits(awq_dir, kv, have);
    return distance(have, want, n);
}

static damage measure(weight_src *base, bool outliers)
{
    weight_src *src = outlier_model(base, outliers, 11);
    const int64_t n = (int64_t)WINDOWS * weights_desc(src)->vocab;
    float *want = malloc((size_t)n * sizeof *want), *have = malloc((size_t)n * sizeof *have);
    damage d;
    err e;
    (void)snprintf(model_dir, sizeof model_dir, "%s/model%d", root, outliers);
    ck_assert_int_eq(mkdir(model_dir, 0777), 0);
    MUST(tiny_dir_write(model_dir, src, &e));
    weights_close(&src);
    MUST(weights_open(&src, model_dir, &e));
    collect_windows(src, WINDOWS);
    weights_close(&src);
    last_logits(model_dir, KV_16, want);
    last_logits(model_dir, KV_4, have);
    d.kv4 = distance(have, want, n);
    quantize("rtn", false, false);
    d.rtn = damage_of(KV_16, want, have, n);
    quantize("best", false, false);
    d.best = damage_of(KV_16, want, have, n);
    pack(true);
    d.folded = damage_of(KV_4, want, have, n);
    quantize("best", true, true);
    d.turned = damage_of(KV_4, want, have, n);
    free(want);
    free(have);
    return d;
}

/* Outliers ruin what knows nothing of them, and cost what does know little. */
START_TEST(outliers_cost_little)
{
    const tiny_opts o = {.desc = tiny_llama(), .seed = 21};
    weight_src *base = NULL;
    err e;
    MUST(tiny_open(&base, &o, &e));
    const damage plain = measure(base, false), with = measure(base, true);
    weights_close(&base);
    printf("squared errors, plain / with outliers: rtn %.3g / %.3g, best %.3g / %.3g\n", plain.rtn,
           with.rtn, plain.best, with.best);
    printf("KV4 %.3g / %.3g, folded %.3g / %.3g, turned %.3g / %.3g\n", plain.kv4, with.kv4,
           plain.folded, with.folded, plain.turned, with.turned);
    ck_assert(with.rtn > 3 * plain.rtn && with.kv4 > 3 * plain.kv4);
    ck_assert(with.best < 1.5 * plain.best && plain.best < plain.rtn);
    ck_assert(with.folded < 1.5 * plain.kv4);
    ck_assert(with.turned < 1.5 * plain.turned && plain.turned < plain.kv4);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("rotate");
    TCase *c = tcase_create("all");
    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_loop_test(c, same_function, 0, 16);
    tcase_add_test(c, not_a_basis);
    tcase_add_test(c, matrix_of_values);
    tcase_add_test(c, angles_of_keys);
#ifdef __SANITIZE_ADDRESS__ /* minutes there, of code that the other suites go through */
    printf("SKIP outliers_cost_little: a build with the address sanitizer\n");
#else
    tcase_add_test(c, outliers_cost_little);
#endif
    suite_add_tcase(s, c);
    return suite_run(s);
}
