/* Any bytes as config.json, a NUL, generation_config.json, a NUL, quant_config.json: refused, or a
 * description that is safe to size memory by. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "formats/hf_config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

static void use(const model_desc *m, const family *f)
{
    static float freq[MODEL_MAX_HEAD_DIM / 2];
    static const int32_t lengths[] = {1, 4096, 1000000};
    tensor_role r[7];
    char name[128];
    err e;
    float mscale;
    const int k = model_block_linears(m, r);
    for (int i = 0; i < k; i++) {
        need(model_linear_n(m, r[i]) > 0 && model_linear_k(m, r[i]) > 0);
        need(f->tensor_name(m, r[i], m->layers - 1, -1, name, sizeof name, &e) == OK);
    }
    need(f->tensor_name(m, ROLE_EMBED, -1, -1, name, sizeof name, &e) == OK);
    need(family_by_name(m->family) == f && family_chat_template(m) != NULL);
    for (int i = 0; i < 3; i++) {
        model_inv_freq(m, lengths[i], freq, &mscale);
        for (int j = 0; j < m->rope_dims / 2; j++) need(isfinite(freq[j]));
        need(isfinite(mscale));
    }
    for (int32_t l = 0; l < m->layers; l++) need(model_window(m, l) >= 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    hf_text part[3] = {{0}};
    model_desc m;
    hf_quant q;
    const family *f;
    err e = {OK, ""};
    size_t at = 0;
    for (int i = 0; i < 3 && at <= n; i++) {
        const uint8_t *end = n > at ? memchr(data + at, 0, n - at) : NULL;
        part[i].text = (const char *)data + at;
        part[i].n = (end ? (size_t)(end - data) : n) - at;
        at += part[i].n + 1;
    }
    const err_code rc = hf_config_parse(&m, &q, &f, part[0], part[1].text ? &part[1] : NULL,
                                        part[2].text ? &part[2] : NULL, "fuzz", &e);
    if (rc == OK)
        use(&m, f);
    else
        need(e.code == rc && strlen(e.msg) > 6 && !strchr(e.msg, '\n'));
    return 0;
}
