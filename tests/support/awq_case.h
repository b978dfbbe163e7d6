/* What the tests of awq/ and calib/ share: a device, paths in a directory of their own, fixed
 * ids, and short ways to make a model, its calib file and the options of a search. */
#ifndef TMF_TESTS_AWQ_CASE_H
#define TMF_TESTS_AWQ_CASE_H

#include <check.h>

#include "awq/fold.h"
#include "awq/search.h"
#include "calib/collect.h"
#include "tests/support/tiny_dir.h"

#define MUST(x) ck_assert_msg((x) == OK, "%s", e.msg)
enum { WINDOWS = 9, SEQLEN = 56 }; /* more tokens than any input has channels: not few.h's */

extern device *dev; /* CPU, two threads, products in f32 */
extern char root[256], model_dir[300], calib_path[300], plan_path[300], awq_dir[300];
extern int32_t ids[WINDOWS * SEQLEN];

void setup(void); /* of a checked fixture */
void teardown(void);
/* The same forms in a size that a search takes no time for; groups of 32 divide it. */
model_desc small(model_desc m);
bool near(double a, double b, double rel);
/* A calib file of the first windows of `ids`. */
void collect_windows(weight_src *src, int32_t windows);
search_opts options(const char *method, const char *loss);
/* A model directory with random weights and its calib file. */
void make_model(model_desc m);
/* All five folds at random, of 2^-most .. 2^most: what is exact stays so. Those of k are equal
 * within a rotated pair. */
void random_folds(const model_desc *m, block_plan *p, int most, uint32_t seed);
void free_folds(block_plan *p);
char *bytes_of(const char *path, size_t *n); /* mem_free */
void same_as(const char *path, const char *want, size_t n);

/* Logits behind the last token of every window, with a cache of that kind: out [WINDOWS,vocab]. */
void last_logits(const char *dir, kv_format kv, float *out);

#endif
