/* From 16-bit or AWQ weights to a TurboMind workspace (docs/formats.md "TurboMind workspace"): q, k
 * and v fused with their rotary columns interleaved, linears stored inputs first, ranks split. */
#ifndef TMF_FORMATS_CONVERT_H
#define TMF_FORMATS_CONVERT_H

#include "formats/tm_config.h"
#include "formats/weights.h"

typedef struct {
    int32_t tp;          /* ranks; 0 means 1 */
    dtype dt;            /* of 16-bit weights: DT_F16, DT_BF16, or DT_NONE: bf16 stays, else f16 */
    int32_t session_len; /* 0: the model's context */
    const char *model_name;    /* NULL: the chat template's name */
    const char *chat_template; /* NULL: the family's */
    bool clamp;                /* values beyond the target type are cut, else E_INPUT */
} convert_opts;

typedef struct convert convert;

/* Decides everything, writes nothing. Borrows `src` and `j` until convert_close. E_UNSUPPORTED for
 * what a workspace cannot hold (group other than 128, experts, q/k norms, mixed precision, a source
 * that is a workspace) or what tp does not divide; warnings through j for what LMDeploy will not
 * do. */
err_code convert_open(convert **out, weight_src *src, const convert_opts *o, const job *j, err *e);
void convert_close(convert **c);

const tm_config *convert_config(const convert *c);
const tm_file *convert_files(const convert *c,
                             size_t *n);  /* weight files in the order of writing */
uint64_t convert_bytes(const convert *c); /* of all weight files */
size_t convert_memory(const convert *c);  /* what convert_write allocates at most */

/* The state of an output path. CURRENT: a workspace of ours from the same parent, options and tool
 * version, with every byte as its manifest says. STALE: ours, but not that. FOREIGN: anything else
 * there. */
typedef enum { CONVERT_ABSENT, CONVERT_CURRENT, CONVERT_STALE, CONVERT_FOREIGN } convert_state;
convert_state convert_look(const convert *c, const char *path);

/* Writes the workspace; `force` replaces whatever is at path. */
err_code convert_write(convert *c, const char *path, bool force, err *e);
/* Makes one weight file again ("layers.0.attention.w_qkv.0.qweight") and compares it with the one
 * in the workspace: E_CHECK with the first byte that differs, E_INPUT for an unknown name. */
err_code convert_compare(convert *c, const char *workspace, const char *name, err *e);

#endif
