/* Paged cache: accounting, all or nothing, limits. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/device.h"
#include "runtime/kv_cache.h"
#include "support/suite.h"

static device *dev;

static void setup(void)
{
    err e;
    ck_assert_int_eq(dev_open(&dev, &(dev_opts){.kind = DEV_CPU, .threads = 1}, &e), OK);
}

static void teardown(void) { dev_close(&dev); }

static kv_opts small_opts(kv_format f)
{
    return (kv_opts){.format = f,
                     .layers = 2,
                     .kv_heads = 2,
                     .head_dim = 8,
                     .block_tokens = 16,
                     .blocks = 10,
                     .max_seqs = 3,
                     .max_seq_tokens = 100};
}

static kv_cache *open_small(void)
{
    err e;
    kv_cache *c;
    const kv_opts o = small_opts(KV_16);
    ck_assert_int_eq(kv_open(&c, dev, &o, &e), OK);
    return c;
}

START_TEST(test_reserve_and_end)
{
    err e;
    int32_t n;
    kv_cache *c = open_small();
    ck_assert_int_eq(kv_free_blocks(c), 10);
    ck_assert_int_eq(kv_reserve(c, 0, 1, &e), OK);
    ck_assert_int_eq(kv_free_blocks(c), 9);
    ck_assert_int_eq(kv_reserve(c, 0, 16, &e), OK); /* the same block */
    ck_assert_int_eq(kv_free_blocks(c), 9);
    ck_assert_int_eq(kv_reserve(c, 0, 17, &e), OK);
    ck_assert_int_eq(kv_reserve(c, 1, 33, &e), OK);
    ck_assert_int_eq(kv_free_blocks(c), 5);
    const int32_t *a = kv_block_list(c, 0, &n);
    ck_assert_int_eq(n, 2);
    ck_assert_int_eq(a[0], 0); /* lowest first: little memory is touched */
    ck_assert_int_eq(a[1], 1);
    kv_seq_end(c, 0);
    kv_seq_end(c, 1);
    kv_seq_end(c, 2); /* empty: nothing happens */
    ck_assert_int_eq(kv_free_blocks(c), 10);
    kv_close(&c);
    ck_assert_ptr_null(c);
    kv_close(&c);
}
END_TEST

START_TEST(test_all_or_nothing)
{
    err e;
    int32_t n;
    kv_cache *c = open_small();
    ck_assert_int_eq(kv_reserve(c, 0, 96, &e), OK);
    ck_assert_int_eq(kv_reserve(c, 1, 32, &e), OK);
    ck_assert_int_eq(kv_free_blocks(c), 2);
    ck_assert_int_eq(kv_reserve(c, 1, 96, &e), E_LIMIT);
    ck_assert_msg(strstr(e.msg, "needs 4 more blocks of 16 tokens, 2 of 10 are free"), "%s", e.msg);
    ck_assert_int_eq(kv_free_blocks(c), 2);
    (void)kv_block_list(c, 1, &n);
    ck_assert_int_eq(n, 2);
    ck_assert_int_eq(kv_reserve(c, 1, 64, &e), OK);
    ck_assert_int_eq(kv_free_blocks(c), 0);
    kv_close(&c);
}
END_TEST

START_TEST(test_limits)
{
    err e;
    kv_cache *c = open_small();
    ck_assert_int_eq(kv_reserve(c, 0, 101, &e), E_LIMIT);
    ck_assert_msg(strstr(e.msg, "needs 101 tokens, the session holds 100"), "%s", e.msg);
    ck_assert_int_eq(kv_reserve(c, 3, 1, &e), E_LIMIT);
    ck_assert_int_eq(kv_reserve(c, -1, 1, &e), E_LIMIT);
    ck_assert_int_eq(kv_reserve(c, 0, -1, &e), E_LIMIT);
    ck_assert_int_eq(kv_reserve(c, 0, 0, &e), OK);
    ck_assert_int_eq(kv_free_blocks(c), 10);
    kv_truncate(c, 7, 0); /* no such slot: nothing happens */
    kv_close(&c);
}
END_TEST

START_TEST(test_truncate)
{
    err e;
    int32_t n;
    kv_cache *c = open_small();
    ck_assert_int_eq(kv_reserve(c, 2, 80, &e), OK);
    kv_truncate(c, 2, 33); /* 3 blocks hold 33 */
    (void)kv_block_list(c, 2, &n);
    ck_assert_int_eq(n, 3);
    kv_truncate(c, 2, 90); /* beyond what is there: nothing happens */
    (void)kv_block_list(c, 2, &n);
    ck_assert_int_eq(n, 3);
    kv_truncate(c, 2, -5);
    ck_assert_int_eq(kv_free_blocks(c), 10);
    kv_close(&c);
}
END_TEST

/* Random traffic against a plain count: no block is lost, none is held twice. */
START_TEST(test_random_traffic)
{
    err e;
    kv_cache *c = open_small();
    int32_t held[3] = {0};
    uint32_t x = 12345;
    for (int step = 0; step < 5000; step++) {
        x = x * 1664525u + 1013904223u;
        const int32_t seq = (int32_t)(x >> 24) % 3, tokens = (int32_t)(x >> 8 & 127);
        const int32_t want = (tokens + 15) / 16, spare = 10 - held[0] - held[1] - held[2];
        if (x >> 30) {
            const err_code rc = kv_reserve(c, seq, tokens, &e);
            const bool fits = tokens <= 100 && (want <= held[seq] || want - held[seq] <= spare);
            ck_assert_int_eq(rc, fits ? OK : E_LIMIT);
            if (fits && want > held[seq]) held[seq] = want;
        } else {
            kv_truncate(c, seq, tokens);
            if (want < held[seq]) held[seq] = want;
        }
        bool seen[10] = {false};
        for (int32_t s = 0; s < 3; s++) {
            int32_t n;
            const int32_t *list = kv_block_list(c, s, &n);
            ck_assert_int_eq(n, held[s]);
            for (int32_t i = 0; i < n; i++) {
                ck_assert(list[i] >= 0 && list[i] < 10 && !seen[list[i]]);
                seen[list[i]] = true;
            }
        }
        ck_assert_int_eq(kv_free_blocks(c), 10 - held[0] - held[1] - held[2]);
    }
    for (int32_t s = 0; s < 3; s++) kv_seq_end(c, s);
    ck_assert_int_eq(kv_free_blocks(c), 10);
    kv_close(&c);
}
END_TEST

START_TEST(test_bytes)
{
    /* 2 layers, 10 blocks, 2 heads, K and V, 16 tokens of 8 channels; int formats add 4 bytes a
     * token. */
    const size_t tokens = (size_t)2 * 10 * 2 * 2 * 16;
    kv_opts o = small_opts(KV_16);
    ck_assert_uint_eq(kv_bytes(&o), tokens * 16);
    o.format = KV_8;
    ck_assert_uint_eq(kv_bytes(&o), tokens * (8 + 4));
    o.format = KV_4;
    ck_assert_uint_eq(kv_bytes(&o), tokens * (4 + 4));
}
END_TEST

START_TEST(test_layer_views)
{
    static const kv_format formats[] = {KV_16, KV_8, KV_4};
    err e;
    for (int i = 0; i < 3; i++) {
        const kv_opts o = small_opts(formats[i]);
        kv_cache *c;
        ck_assert_int_eq(kv_open(&c, dev, &o, &e), OK);
        const kv_layer a = kv_layer_view(c, 0), b = kv_layer_view(c, 1);
        ck_assert_ptr_ne(a.data, b.data);
        ck_assert_int_eq(a.param == NULL, formats[i] == KV_16);
        ck_assert_int_eq(a.blocks, 10);
        ck_assert_int_eq(a.head_dim, 8);
        ck_assert_int_eq(kv_opts_of(c)->format, formats[i]);
        kv_close(&c);
    }
}
END_TEST

START_TEST(test_bad_options)
{
    err e;
    kv_cache *c;
    kv_opts o = small_opts(KV_16);
    o.blocks = 0;
    ck_assert_int_eq(kv_open(&c, dev, &o, &e), E_LIMIT);
    ck_assert_msg(strstr(e.msg, "blocks: expected 1 to 16777216, got 0"), "%s", e.msg);
    o = small_opts(KV_4);
    o.head_dim = 7;
    ck_assert_int_eq(kv_open(&c, dev, &o, &e), E_UNSUPPORTED);
    o = small_opts((kv_format)5);
    ck_assert_int_eq(kv_open(&c, dev, &o, &e), E_UNSUPPORTED);
    ck_assert_ptr_null(c);
}
END_TEST

START_TEST(test_lent)
{
    err e;
    int32_t n;
    kv_cache *c = open_small();
    ck_assert_int_eq(kv_reserve(c, 1, 20, &e), OK);
    ck_assert_int_eq(kv_lend(c, &e), E_USAGE);
    ck_assert_msg(strstr(e.msg, "2 of 10 blocks are in use"), "%s", e.msg);
    kv_seq_end(c, 1);
    ck_assert_int_eq(kv_lend(c, &e), OK);
    ck_assert_int_eq(kv_free_blocks(c), 0);
    ck_assert_int_eq(kv_reserve(c, 0, 1, &e), E_LIMIT);
    kv_set_blocks(c, 0, (int32_t[]){7, 3}, 2);
    kv_set_blocks(c, 1, (int32_t[]){7, 5, 1}, 3); /* 7 is in both */
    ck_assert_int_eq(kv_reserve(c, 0, 32, &e), OK);
    ck_assert_int_eq(kv_reserve(c, 0, 33, &e), E_LIMIT);
    kv_truncate(c, 1, 1);
    kv_seq_end(c, 0);
    const int32_t *t = kv_block_list(c, 1, &n);
    ck_assert(n == 3 && t[0] == 7 && t[2] == 1);
    kv_lend_end(c);
    ck_assert_int_eq(kv_free_blocks(c), 10);
    (void)kv_block_list(c, 1, &n);
    ck_assert_int_eq(n, 0);
    ck_assert_int_eq(kv_reserve(c, 0, 100, &e), OK);
    kv_close(&c);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("kv_cache");
    TCase *t = tcase_create("kv_cache");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, test_reserve_and_end);
    tcase_add_test(t, test_all_or_nothing);
    tcase_add_test(t, test_limits);
    tcase_add_test(t, test_truncate);
    tcase_add_test(t, test_random_traffic);
    tcase_add_test(t, test_bytes);
    tcase_add_test(t, test_layer_views);
    tcase_add_test(t, test_bad_options);
    tcase_add_test(t, test_lent);
    suite_add_tcase(s, t);
    return suite_run(s);
}
