/* make_model: its directories open in every shape, with the tokenizer's vocabulary that of the
 * weights, and its bytes follow from the seed. */
#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "formats/tokenizer.h"
#include "formats/weights.h"
#include "support/suite.h"
#include "support/tempdir.h"

static char dir[64];
static err e;

static void setup(void) { tempdir_make(dir, sizeof dir); }
static void teardown(void) { tempdir_drop(dir); }

static int run(const char *args, const char *name)
{
    char command[1024];
    (void)snprintf(command, sizeof command, "'%s' %s '%s/%s' 2>/dev/null", TMF_MAKE_MODEL, args,
                   dir, name);
    return system(command);
}

static weight_src *open_one(const char *name)
{
    char path[256];
    weight_src *s;
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    ck_assert_msg(weights_open(&s, path, &e) == OK, "%s", e.msg);
    return s;
}

START_TEST(make_shapes)
{
    static const struct {
        const char *shape, *family;
        int32_t head_dim, window_layer_0, window_last;
    } cases[] = {
        {"tiny", "llama", 64, 0, 0},
        {"tiny-llama3", "llama", 64, 0, 0},
        {"tiny-internlm2", "internlm2", 64, 0, 0},
        {"tiny-mistral", "mistral", 64, 64, 64},
        {"tiny-qwen2", "qwen2", 64, 0, 0},
        {"tiny-qwen2-window", "qwen2", 64, 0, 64},
        {"tiny-yi", "yi", 64, 0, 0},
        {"tiny-hd80", "llama", 80, 0, 0},
        {"tiny-hd96", "llama", 96, 0, 0},
        {"tiny-hd256", "llama", 256, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char args[128];
        tokenizer *t;
        token_list ids = {0};
        static const char text[] = "A line, <|im_end|> and \xe4\xb8\xad.";
        (void)snprintf(args, sizeof args, "--shape %s --seed %d", cases[i].shape, (int)i);
        ck_assert_int_eq(run(args, cases[i].shape), 0);
        weight_src *s = open_one(cases[i].shape);
        const model_desc *m = weights_desc(s);
        ck_assert_str_eq(m->family, cases[i].family);
        ck_assert_int_eq(m->head_dim, cases[i].head_dim);
        ck_assert_int_eq(model_window(m, 0), cases[i].window_layer_0);
        ck_assert_int_eq(model_window(m, m->layers - 1), cases[i].window_last);
        ck_assert_int_eq(m->n_stop, 2);
        ck_assert(weights_check_finite(s, NULL, &e) == OK);
        ck_assert_msg(tokenizer_open(&t, weights_tokenizer_dir(s), &e) == OK, "%s", e.msg);
        ck_assert_int_eq(tokenizer_vocab(t), m->vocab);
        ck_assert_int_eq(tokenizer_id(t, "<|im_end|>"), m->vocab - 1);
        ck_assert_msg(tokenizer_encode(t, text, strlen(text), true, &ids, &e) == OK, "%s", e.msg);
        ck_assert_int_eq(ids.n, (int64_t)strlen(text) - 9); /* a byte a token, the special one */
        token_list_free(&ids);
        tokenizer_close(&t);
        weights_close(&s);
    }
}
END_TEST

START_TEST(make_same_bytes)
{
    ck_assert_int_eq(run("--seed 3 --dtype f16", "a"), 0);
    ck_assert_int_eq(run("--seed 3 --dtype f16", "b"), 0);
    ck_assert_int_eq(run("--seed 4 --dtype f16", "c"), 0);
    ck_assert_int_eq(run("--seed 3 --dtype f16 --shards 3 --layers 3", "d"), 0);
    weight_src *a = open_one("a"), *b = open_one("b"), *c = open_one("c"), *d = open_one("d");
    linear_view x, y;
    ck_assert_str_eq(weights_digest(a), weights_digest(b));
    ck_assert_str_ne(weights_digest(a), weights_digest(c));
    ck_assert_int_eq(weights_desc(d)->layers, 3);
    ck_assert(weights_linear(a, ROLE_DOWN, 1, -1, &x, &e) == OK &&
              weights_linear(d, ROLE_DOWN, 1, -1, &y, &e) == OK);
    ck_assert_int_eq((int)x.dense.dt, DT_F16);
    ck_assert_mem_eq(x.dense.data, y.dense.data, tensor_bytes(&x.dense));
    weights_close(&a);
    weights_close(&b);
    weights_close(&c);
    weights_close(&d);
}
END_TEST

START_TEST(make_refuses)
{
    ck_assert_int_ne(run("--shape no-such-shape", "x"), 0);
    ck_assert_int_ne(run("--dtype i8", "x"), 0);
    ck_assert_int_ne(run("--vocab 10", "x"), 0);
    ck_assert_int_ne(run("--head-dim 7", "x"), 0);
}
END_TEST

int main(void)
{
    if (access("/dev/shm", W_OK) == 0)
        (void)setenv("TMPDIR", "/dev/shm", 0); /* syncs cost nothing there */
    Suite *s = suite_create("make_model");
    TCase *t = tcase_create("all");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 120);
    tcase_add_test(t, make_shapes);
    tcase_add_test(t, make_same_bytes);
    tcase_add_test(t, make_refuses);
    suite_add_tcase(s, t);
    return suite_run(s);
}
