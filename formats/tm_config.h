/* config.yaml of a TurboMind workspace (LMDeploy v0.6.0 .. v0.7.3, "epoch C"): the one place that
 * knows its keys, and the list of weight files that follows from it (docs/formats.md "TurboMind
 * workspace"). */
#ifndef TMF_FORMATS_TM_CONFIG_H
#define TMF_FORMATS_TM_CONFIG_H

#include <cjson/cJSON.h>

#include "formats/model.h"

/* C1: v0.6.0 .. v0.6.3, inter_size a number. C2: v0.6.4 .. v0.7.3, a list. We write C2 and read
 * both. */
typedef enum { TM_C1, TM_C2 } tm_epoch;

typedef struct {
    tm_epoch epoch;
    model_desc m; /* qkv QKV_CONCAT; ffn and kv_heads as stored (padded, replicated); dt and
                     w4_group say what the files hold; stop ids, window and bos/eos are not in the
                     yaml beyond start_id and end_id */
    int32_t tp;
    int32_t embedding_size; /* rows of the embedding */
    int32_t session_len;
    int32_t start_id, end_id;
    char model_name[128], chat_template[128], model_format[32];
} tm_config;

/* "linear", "llama3", ...; "" for none: how the yaml spells a rope scaling. */
const char *tm_config_scaling(rope_kind k);
/* Checks every number; E_INPUT names the key, E_UNSUPPORTED what no reader of ours handles
 * (experts, MLA, LoRA, logn). `yaml` as yaml_parse gives it. */
err_code tm_config_read(tm_config *out, const cJSON *yaml, err *e);
/* The text to write: keys sorted, block style. Caller frees with mem_free. */
err_code tm_config_print(char **out, const tm_config *c, err *e);

typedef enum { TM_WEIGHT, TM_QWEIGHT, TM_SCALES, TM_ZEROS, TM_BIAS, TM_PART_COUNT } tm_part;
typedef struct {
    char name[96];    /* "layers.3.attention.w_qkv.0.qweight" */
    tensor_role role; /* EMBED, FINAL_NORM, HEAD, ATTN_NORM, FFN_NORM, QKV, O, GATE (w1), UP (w3),
                         DOWN (w2) */
    tm_part part;
    int32_t layer, rank; /* -1: of the model; rank -1: the name has none */
    dtype dt;
    int64_t rows, cols; /* as stored, inputs first for linears; vectors have rows 1 */
    uint64_t bytes;
} tm_file;
/* Every weight file of a workspace, model level first, then layer by layer, ranks in order. Free
 * with mem_free. */
err_code tm_config_files(tm_file **out, size_t *n, const tm_config *c, err *e);

#endif
