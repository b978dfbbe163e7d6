/* Directories for tests of model reading: a small good one in a temporary place, ways to spoil it,
 * and what must come of it. One case at a time: the directory and the last error are shared. */
#ifndef TMF_TESTS_HF_CASE_H
#define TMF_TESTS_HF_CASE_H

#include <check.h>

#include "formats/weights.h"

extern char hf_case_dir[64]; /* set up and removed by the fixture of hf_cases_of */
extern err hf_err;

void hf_setup(void);
void hf_teardown(void);
TCase *hf_cases_of(const char *name, Suite *s);
int hf_run(Suite *s); /* the exit code of the program */

const char *hf_in(const char *name); /* path of a file in hf_case_dir; the last two results hold */
void hf_llama(void);                 /* writes a Llama of two layers (tiny_llama) there */

typedef struct {
    enum { HF_DROP, HF_PUT } op; /* HF_PUT: adds, or replaces one of that name */
    const char *name;
    dtype dt;
    int ndim;
    int64_t shape[2];
    const void *data; /* NULL: zeros */
} hf_change;
/* Copies the tensors of `from` into `to` (plain names): those whose index is `part` modulo `parts`;
 * part 0 gets what the changes put. */
void hf_copy(const char *from, const char *to, int part, int parts, const hf_change *c, int n);
void hf_rewrite(const hf_change *c, int n); /* model.safetensors in place */
void hf_part_name(char *buf, size_t cap, int part, int parts);
void hf_split(int parts, bool index); /* model.safetensors into parts */
/* Replaces the first occurrence of `old` in a text file. */
void hf_edit(const char *file, const char *old, const char *new);

void hf_opens(void);
void hf_digest_of(char out[65]); /* weights_digest of the directory */
/* Refused with this code and a message of one line that names the path and holds the fragment. */
void hf_refused(err_code code, const char *fragment);

#endif
