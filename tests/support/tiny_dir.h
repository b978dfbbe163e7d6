/* A small Hugging Face directory on disk from weights in memory: config.json as the families read
 * it, one safetensors file, and stand-ins for the files that travel along. */
#ifndef TMF_TESTS_TINY_DIR_H
#define TMF_TESTS_TINY_DIR_H

#include "formats/weights.h"

/* Llama: split q, k, v, no bias, own head. 2 layers, hidden 256, 4 heads of 64 over 2, ffn 384,
 * vocabulary 50: groups of 128 fit. */
model_desc tiny_llama(void);
model_desc tiny_internlm2(void); /* grouped qkv, 2 heads of 128 over 1 */
model_desc tiny_qwen2(void);     /* q, k, v biases, tied head */

/* Dense weights of `src` (SRC_MEM) as they are; dir must exist. */
err_code tiny_dir_write(const char *dir, weight_src *src, err *e);
/* tiny_open and tiny_dir_write in one: random weights in bf16. Ends the test on failure. */
void tiny_dir_make(const char *dir, const model_desc *m, uint64_t seed);
/* An AWQ directory of the same weights rounded to nearest; dense_dir gives the config. */
void tiny_awq_make(const char *out, const char *dense_dir, const model_desc *m, uint64_t seed,
                   int32_t group);
void tiny_file_write(const char *dir, const char *name, const char *text);

#endif
