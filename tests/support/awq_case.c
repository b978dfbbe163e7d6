/* What the tests of awq/ and calib/ share. */
#include "tests/support/awq_case.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/model.h"
#include "tests/support/tempdir.h"
#include "tests/support/tiny_weights.h"

device *dev;
char root[256], model_dir[300], calib_path[300], plan_path[300], awq_dir[300];
int32_t ids[WINDOWS * SEQLEN];

void setup(void)
{
    err e;
    MUST(dev_open(&dev, &(dev_opts){.kind = DEV_CPU, .threads = 2, .isa = "avx2"},
                  &e)); /* f32 products */
    tempdir_make(root, sizeof root);
    (void)snprintf(model_dir, sizeof model_dir, "%s/model", root);
    (void)snprintf(calib_path, sizeof calib_path, "%s/calib", root);
    (void)snprintf(plan_path, sizeof plan_path, "%s/plan", root);
    (void)snprintf(awq_dir, sizeof awq_dir, "%s/awq", root);
    uint32_t x = 1;
    for (int i = 0; i < WINDOWS * SEQLEN; i++)
        ids[i] = (int32_t)((x = x * 1664525u + 1013904223u) >> 16) % 50;
}

void teardown(void)
{
    dev_close(&dev);
    tempdir_drop(root);
}

model_desc small(model_desc m)
{
    m.hidden = 64;
    m.ffn = 96;
    m.head_dim = m.rope_dims = m.head_dim / 4;
    return m;
}

bool near(double a, double b, double rel) { return fabs(a - b) <= rel * fmax(fabs(a), fabs(b)); }

void collect_windows(weight_src *src, int32_t windows)
{
    const collect_opts o = {
        .out_path = calib_path, .tokenizer = "t", .options = "{}", .force = true};
    const tensor tokens = tensor_2d(ids, DT_I32, windows, SEQLEN);
    collect_summary s;
    err e;
    MUST(collect_run(&s, dev, src, &tokens, &o, NULL, &e));
    ck_assert_int_eq(s.held_out, windows / 8);
}

search_opts options(const char *method, const char *loss)
{
    return (search_opts){.model_dir = model_dir,
                         .calib_path = calib_path,
                         .out_path = plan_path,
                         .method = method,
                         .loss = loss,
                         .kv_fold = -1,
                         .group = 32,
                         .gram_bytes = (int64_t)1 << 30,
                         .force = true};
}

void make_model(model_desc m)
{
    weight_src *src = NULL;
    err e;
    tiny_dir_make(model_dir, &m, 6);
    MUST(weights_open(&src, model_dir, &e));
    collect_windows(src, WINDOWS);
    weights_close(&src);
}

void random_folds(const model_desc *m, block_plan *p, int most, uint32_t seed)
{
    *p = plan_shape(m, 32);
    for (int i = 0; i < PLAN_FOLDS; i++) {
        tensor *s = &p->fold[i].s;
        s->data = malloc(tensor_bytes(s));
        for (int64_t c = 0; c < tensor_count(s); c++) {
            const uint32_t x = (seed = seed * 1664525u + 1013904223u) >> 8;
            ((float *)s->data)[c] = ldexpf(1, (int)(x % (2 * (unsigned)most + 1)) - most);
        }
    }
    float *k = plan_find_fold(p, ROLE_K)->s.data;
    for (int64_t i = 0; i < m->rope_dims / 2; i++) {
        int64_t a, b;
        fold_rope_pair(m, i, &a, &b);
        for (float *head = k; head < k + m->kv_heads * m->head_dim; head += m->head_dim)
            head[b] = head[a];
    }
}

void free_folds(block_plan *p)
{
    for (int i = 0; i < PLAN_FOLDS; i++) free(p->fold[i].s.data);
}

char *bytes_of(const char *path, size_t *n)
{
    char *text;
    err e;
    MUST(file_read(&text, n, path, (size_t)1 << 26, &e));
    return text;
}

void same_as(const char *path, const char *want, size_t n)
{
    size_t m;
    char *have = bytes_of(path, &m);
    ck_assert_uint_eq(m, n);
    ck_assert_msg(memcmp(have, want, n) == 0, "%s differs", path);
    mem_free(have);
}

void last_logits(const char *dir, kv_format kv, float *out)
{
    weight_src *src = NULL;
    model *m = NULL;
    err e;
    MUST(weights_open(&src, dir, &e));
    const int32_t vocab = weights_desc(src)->vocab;
    const model_opts o = {.kv = kv, .session_len = SEQLEN, .kv_mem_bytes = 1 << 22};
    MUST(model_open(&m, dev, src, &o, NULL, &e));
    for (int w = 0; w < WINDOWS; w++) {
        const step_seq s = {
            .tokens = ids + w * SEQLEN, .n_tokens = SEQLEN, .n_out = 1, .logits = out + w * vocab};
        MUST(model_step(m, &s, 1, NULL, &e));
        model_seq_end(m, 0);
    }
    model_close(&m);
    weights_close(&src);
}
