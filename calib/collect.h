/* calib-collect as a library call: token windows in, calib file out, one block resident at a time.
 */
#ifndef TMF_CALIB_COLLECT_H
#define TMF_CALIB_COLLECT_H

#include "formats/weights.h"
#include "kernels/device.h"
#include "runtime/memory_plan.h"

typedef struct {
    const char *out_path;
    const char *tokenizer; /* digest of the tokenizer files */
    const char *options;   /* JSON: how the windows were chosen; goes into the file */
    double save_s;         /* least seconds between two savings of the hidden states */
    bool force;
} collect_opts;

typedef struct {
    int32_t layers, resumed; /* layers taken over from a killed run */
    int32_t samples, seqlen, held_out;
    bool fresh; /* the file was there already */
} collect_summary;

/* Statistics and forward pass; what choosing the windows takes is not in it. */
void collect_memory(memory_plan *p, device *d, weight_src *src, int32_t samples, int32_t seqlen);
/* tokens i32 [samples,seqlen]. E_CANCELED leaves finished layers in "<out_path>.part". */
err_code collect_run(collect_summary *out, device *d, weight_src *src, const tensor *tokens,
                     const collect_opts *o, const job *j, err *e);

#endif
