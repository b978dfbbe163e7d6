/* From config files to a description. Everything that a file may lie about is bounded here or in
 * model_desc_check; what the tensors contradict shows when the directory is opened. */
#include "formats/hf_config.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/family_common.h"

/* ---- quantization ---- */
static err_code read_group(const cJSON *o, const char *key, hf_quant *q, err *e)
{
    int32_t group;
    TRY(json_opt_i32(o, key, -1, MODEL_MAX_WIDTH, 128, &group, e));
    if (group != 32 && group != 64 && group != 128)
        return err_set(e, E_UNSUPPORTED,
                       "AWQ group size %d is not supported; supported are 32, 64, 128", group);
    q->group = group;
    return OK;
}

/* Both spellings: bits and group_size of quantization_config, w_bit and q_group_size of
 * quant_config.json. */
static err_code read_awq(const cJSON *o, const char *bits_key, const char *group_key, hf_quant *q,
                         err *e)
{
    const char *version;
    int32_t bits;
    TRY(json_opt_i32(o, bits_key, 1, 64, 4, &bits, e));
    TRY(json_opt_str(o, "version", "gemm", &version, e));
    TRY(json_opt_bool(o, "zero_point", true, &q->zero_point, e));
    if (strcasecmp(version, "gemm") != 0)
        return err_set(e, E_UNSUPPORTED, "AWQ version '%.32s' is not supported; supported is gemm",
                       version);
    if (bits != 4)
        return err_set(e, E_UNSUPPORTED, "AWQ with %d bits is not supported; supported is 4", bits);
    TRY(read_group(o, group_key, q, e));
    q->awq = true;
    return OK;
}

static err_code read_quant(const cJSON *config, hf_quant *q, err *e)
{
    const cJSON *o = cJSON_GetObjectItemCaseSensitive(config, "quantization_config");
    const char *method;
    const cJSON *old = cJSON_GetObjectItemCaseSensitive(config, "compression_config");
    if (old && !cJSON_IsNull(old))
        return err_set(e, E_UNSUPPORTED,
                       "quantization 'compressed-tensors' is not supported; supported is awq");
    if (!o || cJSON_IsNull(o)) return OK;
    if (!cJSON_IsObject(o))
        return err_set(e, E_INPUT, "key 'quantization_config': expected an object");
    TRY(json_get_str(o, "quant_method", &method, e));
    if (strcmp(method, "awq") != 0)
        return err_set(e, E_UNSUPPORTED, "quantization '%.32s' is not supported; supported is awq",
                       method);
    return read_awq(
        o, cJSON_GetObjectItemCaseSensitive(o, "w_bit") ? "w_bit" : "bits",
        cJSON_GetObjectItemCaseSensitive(o, "q_group_size") ? "q_group_size" : "group_size", q, e);
}

/* ---- parsing ---- */
static err_code parse_side(const hf_text *side, hf_quant *q, err *e)
{
    cJSON *o;
    TRY(json_parse(&o, side->text, side->n, "quant_config.json", e));
    const err_code rc = read_awq(o, "w_bit", "q_group_size", q, e);
    cJSON_Delete(o);
    return rc == OK ? OK : err_wrap(e, "quant_config.json");
}

static err_code parse_generation(const hf_text *text, model_desc *m, err *e)
{
    cJSON *o;
    TRY(json_parse(&o, text->text, text->n, "generation_config.json", e));
    const err_code rc = cJSON_IsObject(o) ? family_read_ids(o, "eos_token_id", m, &m->eos, e)
                                          : err_set(e, E_INPUT, "expected an object");
    cJSON_Delete(o);
    return rc == OK ? OK : err_wrap(e, "generation_config.json");
}

static err_code read_config(const cJSON *config, model_desc *m, hf_quant *q, const family **f,
                            err *e)
{
    if (!cJSON_IsObject(config)) return err_set(e, E_INPUT, "expected an object");
    TRY(family_of_config(f, config, e));
    TRY((*f)->read_config(config, m, e));
    (void)snprintf(m->family, sizeof m->family, "%s", (*f)->name);
    return read_quant(config, q, e);
}

err_code hf_config_parse(model_desc *m, hf_quant *q, const family **f, hf_text config,
                         const hf_text *generation, const hf_text *side, const char *what, err *e)
{
    cJSON *o;
    *q = (hf_quant){0};
    *m = (model_desc){0};
    TRY(json_parse(&o, config.text, config.n, what, e));
    err_code rc = read_config(o, m, q, f, e);
    if (rc != OK) err_wrap(e, "%s", what);
    cJSON_Delete(o);
    if (rc != OK) return rc;
    if (generation) TRY(parse_generation(generation, m, e));
    if (side && !q->awq) TRY(parse_side(side, q, e));
    m->w4_group = q->group;
    if (model_desc_check(m, e) != OK) return err_wrap(e, "%s", what);
    return OK;
}

/* ---- files ---- */
/* Leaves text NULL when the file is not there. */
static err_code load_optional(hf_text *out, const char *dir, const char *name, err *e)
{
    char path[4096], *text;
    TRY(path_join(path, sizeof path, dir, name, e));
    if (!file_exists(path)) return OK;
    TRY(file_read(&text, &out->n, path, HF_MAX_CONFIG, e));
    out->text = text;
    return OK;
}

err_code hf_config_load(model_desc *m, hf_quant *q, const family **f, const char *dir, err *e)
{
    hf_text config = {0}, generation = {0}, side = {0};
    char what[4096];
    err_code rc;
    if ((rc = path_join(what, sizeof what, dir, "config.json", e)) != OK) goto done;
    if ((rc = load_optional(&config, dir, "config.json", e)) != OK) goto done;
    if (!config.text) {
        rc = err_set(e, E_INPUT, "'%s' has no config.json", dir);
        goto done;
    }
    if ((rc = load_optional(&generation, dir, "generation_config.json", e)) != OK) goto done;
    if ((rc = load_optional(&side, dir, "quant_config.json", e)) != OK) goto done;
    rc = hf_config_parse(m, q, f, config, generation.text ? &generation : NULL,
                         side.text ? &side : NULL, what, e);
done:
    mem_free((void *)(uintptr_t)side.text);
    mem_free((void *)(uintptr_t)generation.text);
    mem_free((void *)(uintptr_t)config.text);
    return rc;
}
