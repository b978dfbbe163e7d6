/* config.json, generation_config.json and quantization_config of a Hugging Face directory, as a
 * description. */
#ifndef TMF_FORMATS_HF_CONFIG_H
#define TMF_FORMATS_HF_CONFIG_H

#include "formats/family.h"

#define HF_MAX_CONFIG ((size_t)4 << 20) /* bytes of a config file */

typedef struct {
    bool awq;        /* AWQ in GEMM layout, 4 bits */
    int32_t group;   /* 32, 64 or 128 */
    bool zero_point; /* false: some writers then leave qzeros without meaning */
} hf_quant;

/* text[n] is a config.json. m->dt is what the config claims; the tensors decide. generation may be
 * NULL: the text of a generation_config.json, whose eos ids join the stop ids. side may be NULL: a
 * quant_config.json, which old AWQ writers left instead of a quantization_config. E_INPUT for what
 * is wrong, E_UNSUPPORTED for unknown families, rope scalings, and quantization other than AWQ GEMM
 * with 4 bits and a group of 32, 64 or 128. The description has passed model_desc_check. `what`
 * names the file in errors. Frees nothing of the caller's. */
typedef struct {
    const char *text;
    size_t n;
} hf_text;
err_code hf_config_parse(model_desc *m, hf_quant *q, const family **f, hf_text config,
                         const hf_text *generation, const hf_text *side, const char *what, err *e);
/* The same from the files of a directory. */
err_code hf_config_load(model_desc *m, hf_quant *q, const family **f, const char *dir, err *e);

#endif
