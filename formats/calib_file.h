/* The calib artifact: what calib-collect saw. One safetensors file (docs/formats.md "Calib file"):
 *   tokens i32 [samples,seqlen], held_out u8 [samples] (1: kept apart for acceptance; one window in
 * eight) layers.<i>.<tap>.absmax f32 [k], .abssum f64 [k], .count i64 [1] (tokens seen), .blocks
 * f32 [k/g,g,g] tap: the linear whose input it is: qkv, o, gate, down. blocks: the g x g diagonal
 * blocks of H = sum x x^T, with g = calib_block_size(k). The statistics cover all windows, held out
 * or not. */
#ifndef TMF_FORMATS_CALIB_FILE_H
#define TMF_FORMATS_CALIB_FILE_H

#include "formats/artifact.h"
#include "formats/model.h"
#include "formats/spool.h"

#define CALIB_KIND           "calib"
#define CALIB_VERSION        1
#define CALIB_TAPS           4
#define CALIB_HELD_OUT_EVERY 8

/* 128, 64 or 32, the largest that divides k; where none does, the largest divisor of k up to 128.
 */
int32_t calib_block_size(int64_t k);

typedef struct {
    tensor_role tap;  /* ROLE_QKV, ROLE_O, ROLE_GATE or ROLE_DOWN, as block_forward calls taps */
    int64_t k, count; /* count: tokens seen, 0 where none came through */
    int32_t g;
    tensor absmax; /* f32 [k] */
    tensor abssum; /* f64 [k] */
    tensor blocks; /* f32 [k/g,g,g], both triangles */
} calib_tap;

typedef struct {
    calib_tap tap[CALIB_TAPS];
    int n_taps;
} calib_block;
/* The tap that sees linear r's input: q, k and v map to qkv, up to gate. */
tensor_role calib_tap_of(tensor_role r);
/* Of that input; NULL when the layer has no such tap. */
const calib_tap *calib_find(const calib_block *b, tensor_role r);
/* The taps of a block with their k, in forward order; counts zero, tensors empty. */
calib_block calib_shape(const model_desc *m);

typedef struct {
    int32_t layers, samples, seqlen;
    const char *model;     /* weights_digest of the parent */
    const char *tokenizer; /* digest of the tokenizer files */
    const char *options;   /* JSON: how the windows were chosen */
} calib_info;

/* ---- reading: everything is checked at open except the values, which calib_layer checks ---- */
typedef struct calib_file calib_file;
err_code calib_open(calib_file **out, const char *path, err *e);
err_code calib_open_memory(calib_file **out, const void *data, size_t size, const char *name,
                           err *e); /* borrowed */
void calib_close(calib_file **f);
const calib_info *calib_info_of(const calib_file *f); /* strings live as long as f */
hash128 calib_digest(const calib_file *f);            /* what a plan records as its parent */
tensor calib_tokens(const calib_file *f);             /* i32 [samples,seqlen] */
tensor calib_held_out(const calib_file *f);           /* u8 [samples] */
/* Views into the file. E_INPUT naming tap and channel when a statistic is negative or not finite.
 */
err_code calib_layer(const calib_file *f, int32_t layer, calib_block *view, err *e);
/* E_INPUT with both digests unless it was collected from the model with this digest; E_INPUT when
 * layers or tap widths are not the model's. */
err_code calib_check_model(const calib_file *f, const model_desc *m, const char *digest, err *e);

/* ---- writing: layers go to the spool as they are done, calib_finish makes the file ---- */
err_code calib_put_layer(spool *s, int32_t layer, const calib_block *b, err *e);
err_code calib_finish(spool *s, const calib_info *info, const tensor *tokens,
                      const tensor *held_out, err *e);

#endif
