/* formats/plan_file: what is written reads back, nothing else passes. */
#include "formats/plan_file.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"
#include "tests/support/suite.h"
#include "tests/support/tempdir.h"
#include "tests/support/tiny_dir.h"

#define MUST(x) ck_assert_msg((x) == OK, "%s", e.msg)
enum { GROUP = 64 };

static char root[256], path[300];
static model_desc m;
static block_plan plan; /* owned data */

static void setup(void)
{
    tempdir_make(root, sizeof root);
    (void)snprintf(path, sizeof path, "%s/plan", root);
    m = tiny_llama();
    plan = plan_shape(&m, GROUP);
    for (int i = 0; i < PLAN_FOLDS; i++) {
        tensor *s = &plan.fold[i].s;
        s->data = calloc((size_t)tensor_count(s), 4);
        for (int64_t c = 0; c < tensor_count(s); c++) ((float *)s->data)[c] = 0.5f + (float)(c % 9);
    }
    for (int i = 0; i < plan.n_linears; i++) {
        plan_linear *l = &plan.linear[i];
        const int64_t n = tensor_count(&l->scale);
        l->scale.data = calloc((size_t)n, 2);
        l->zero.data = calloc((size_t)n, 1);
        l->codes.data = calloc((size_t)tensor_count(&l->codes), 1);
        for (int64_t c = 0; c < n; c++) {
            ((f16 *)l->scale.data)[c] = f32_to_f16(0.001f * (float)(1 + c % 50));
            ((uint8_t *)l->zero.data)[c] = (uint8_t)(c % 16);
        }
        l->loss_before = 100 + i;
        l->loss_after = 50 + i;
    }
}

static void teardown(void)
{
    for (int i = 0; i < PLAN_FOLDS; i++) free(plan.fold[i].s.data);
    for (int i = 0; i < plan.n_linears; i++) {
        free(plan.linear[i].scale.data);
        free(plan.linear[i].zero.data);
        free(plan.linear[i].codes.data);
    }
    tempdir_drop(root);
}

/* The plan as it stands; `drop` leaves out codes and the folds of v and k, as most methods do. */
static void write_plan(bool drop, bool rotation)
{
    const spool_opts o = {path, PLAN_KIND, PLAN_VERSION, "print", m.layers, true};
    const plan_info info = {m.layers, GROUP,          "best",        "{\"group\":64}",
                            "gram",   "model-digest", "calib-digest"};
    float square[4] = {0, 1, -1, 0};
    const artifact_part r = {.name = "rotation.residual", .t = tensor_2d(square, DT_F32, 2, 2)};
    block_plan p = plan;
    spool *s = NULL;
    bool fresh;
    double before, after;
    err e;
    for (int i = 0; i < p.n_linears && drop; i++) p.linear[i].codes.data = NULL;
    if (drop) plan_find_fold(&p, ROLE_V)->s.data = plan_find_fold(&p, ROLE_K)->s.data = NULL;
    MUST(spool_open(&s, &o, &fresh, &e));
    for (int32_t l = 0; l < m.layers; l++) MUST(plan_put_layer(s, l, &p, &e));
    MUST(plan_spooled_loss(s, 0, &before, &after, &e));
    ck_assert(before == 721 && after == 371); /* sums over seven linears */
    MUST(plan_finish(s, &info, &r, rotation ? 1 : 0, &e));
    spool_close(&s);
}

static plan_file *reopen(void)
{
    plan_file *f = NULL;
    err e;
    MUST(plan_open(&f, path, &e));
    return f;
}

START_TEST(round_trip)
{
    err e;
    block_plan b;
    tensor r;
    write_plan(false, true);
    plan_file *f = reopen();
    MUST(plan_check_model(f, &m, "model-digest", &e));
    const plan_info *i = plan_info_of(f);
    ck_assert_str_eq(i->method, "best");
    ck_assert_str_eq(i->loss, "gram");
    ck_assert_str_eq(i->calib, "calib-digest");
    ck_assert_int_eq(i->group, GROUP);
    ck_assert_int_eq(plan_rotation_count(f), 1);
    ck_assert(plan_rotation(f, "residual", &r) && r.shape[1] == 2);
    ck_assert(!plan_rotation(f, "other", &r));
    for (int32_t l = 0; l < m.layers; l++) {
        MUST(plan_layer(f, l, &b, &e));
        ck_assert_int_eq(b.n_linears, 7);
        for (int k = 0; k < PLAN_FOLDS; k++) {
            const plan_fold *want = &plan.fold[k], *have = plan_find_fold(&b, want->source);
            ck_assert_mem_eq(have->s.data, want->s.data, tensor_bytes(&want->s));
        }
        for (int k = 0; k < b.n_linears; k++) {
            const plan_linear *want = &plan.linear[k], *have = plan_find_linear(&b, want->role);
            ck_assert_mem_eq(have->scale.data, want->scale.data, tensor_bytes(&want->scale));
            ck_assert_mem_eq(have->zero.data, want->zero.data, tensor_bytes(&want->zero));
            ck_assert_mem_eq(have->codes.data, want->codes.data, tensor_bytes(&want->codes));
            ck_assert(have->loss_before == want->loss_before &&
                      have->loss_after == want->loss_after);
        }
    }
    ck_assert_int_eq(plan_layer(f, -1, &b, &e), E_INPUT);
    plan_close(&f);
}
END_TEST

START_TEST(parts_may_be_missing)
{
    err e;
    block_plan b;
    write_plan(true, false);
    plan_file *f = reopen();
    MUST(plan_layer(f, 1, &b, &e));
    ck_assert_ptr_null(plan_find_fold(&b, ROLE_V)->s.data);
    ck_assert_ptr_nonnull(plan_find_fold(&b, ROLE_UP)->s.data);
    ck_assert_ptr_null(plan_find_linear(&b, ROLE_GATE)->codes.data);
    plan_close(&f);
}
END_TEST

START_TEST(wrong_parent)
{
    err e;
    write_plan(true, false);
    plan_file *f = reopen();
    ck_assert_int_eq(plan_check_model(f, &m, "another", &e), E_INPUT);
    ck_assert(strstr(e.msg, "made from model model-digest, but this one is another") != NULL);
    model_desc other = m;
    other.layers = 3;
    ck_assert_int_eq(plan_check_model(f, &other, "model-digest", &e), E_INPUT);
    other = m;
    other.ffn += GROUP;
    ck_assert_int_eq(plan_check_model(f, &other, "model-digest", &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "layer 0: gate: expected scales [448,4], found [384,4]") != NULL,
                  "%s", e.msg);
    other = m;
    other.qkv = QKV_CONCAT;
    ck_assert_int_eq(plan_check_model(f, &other, "model-digest", &e), E_INPUT);
    plan_close(&f);
}
END_TEST

START_TEST(values_are_checked)
{
    err e;
    block_plan b;
    f16 *scale = plan_find_linear(&plan, ROLE_O)->scale.data;
    uint8_t *zero = plan_find_linear(&plan, ROLE_Q)->zero.data;
    float *s = plan_find_fold(&plan, ROLE_UP)->s.data;
    static const struct {
        float s;
        f16 scale;
        uint8_t zero;
        const char *text;
    } cases[] = {
        {NAN, 1, 0, "fold of up: channel 2"}, {0, 1, 0, "fold of up: channel 2"},
        {-1, 1, 0, "fold of up: channel 2"},  {INFINITY, 1, 0, "fold of up: channel 2"},
        {1, 0, 0, "o: row 0 group 3"},        {1, 0x7c00, 0, "o: row 0 group 3"},
        {1, 0x8400, 0, "o: row 0 group 3"},   {1, 0x7e00, 0, "o: row 0 group 3"},
        {1, 1, 16, "q: row 0 group 1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        s[2] = cases[i].s;
        scale[3] = cases[i].scale;
        zero[1] = cases[i].zero;
        write_plan(true, false);
        plan_file *f = reopen();
        ck_assert_int_eq(plan_layer(f, 0, &b, &e), E_INPUT);
        ck_assert_msg(strstr(e.msg, cases[i].text) != NULL, "%s", e.msg);
        plan_close(&f);
    }
}
END_TEST

START_TEST(corruption)
{
    char *text;
    size_t n;
    uint64_t head;
    err e;
    write_plan(false, true);
    MUST(file_read(&text, &n, path, 1 << 24, &e));
    memcpy(&head, text, 8);
    for (size_t at = 8 + head; at < n; at += 997) {
        plan_file *f = NULL;
        text[at] = (char)(text[at] ^ 1);
        ck_assert_int_eq(plan_open_memory(&f, text, n, "x", &e), E_INPUT);
        ck_assert_ptr_null(f);
        text[at] = (char)(text[at] ^ 1);
    }
    for (size_t at = 0; at < n; at += at < 9 + head ? 101 : 4999) {
        plan_file *f = NULL;
        ck_assert_int_ne(plan_open_memory(&f, text, at, "cut", &e), OK);
    }
    mem_free(text);
}
END_TEST

START_TEST(other_headers)
{
    static const char *const cases[][3] = {
        {"\"kind\":\"plan\"", "\"kind\":\"plum\"", "kind: expected 'plan', found 'plum'"},
        {"\"version\":\"1\"", "\"version\":\"2\"", "version: expected '1', found '2'"},
        {"\"group\":\"64\"", "\"group\":\"32\"", "codes"},
        {"\"layers\":\"2\"", "\"layers\":\"1\"", "tensors by its layers"},
        {"\"parent.calib\"", "\"parent.kalib\"", "expected key 'parent.calib', found none"},
        {"\"xxh3.layers.0.down.zero\"", "\"xxh3.layers.0.down.hero\"", "layers.0.down.zero"},
    };
    char *text;
    size_t n;
    err e;
    write_plan(false, false);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        plan_file *f = NULL;
        MUST(file_read(&text, &n, path, 1 << 24, &e));
        char *at = memmem(text, n, cases[i][0], strlen(cases[i][0]));
        ck_assert_ptr_nonnull(at);
        memcpy(at, cases[i][1], strlen(cases[i][1]));
        ck_assert_int_eq(plan_open_memory(&f, text, n, "x", &e), E_INPUT);
        ck_assert_msg(strstr(e.msg, cases[i][2]) != NULL, "%s", e.msg);
        mem_free(text);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("plan_file");
    TCase *t = tcase_create("file");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, round_trip);
    tcase_add_test(t, parts_may_be_missing);
    tcase_add_test(t, wrong_parent);
    tcase_add_test(t, values_are_checked);
    tcase_add_test(t, corruption);
    tcase_add_test(t, other_headers);
    suite_add_tcase(s, t);
    return suite_run(s);
}
