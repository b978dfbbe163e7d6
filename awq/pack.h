/* pack-w4 as a library call: a model and its plan in, a Hugging Face AWQ directory out. One linear
 * is held at a time. */
#ifndef TMF_AWQ_PACK_H
#define TMF_AWQ_PACK_H

#include "base/job.h"
#include "kernels/device.h"
#include "runtime/memory_plan.h"

typedef struct {
    const char *model_dir, *plan_path, *out_dir;
    int64_t shard_bytes; /* 0: the writer's default */
    bool clamp_f16;      /* values beyond f16 become +-65504; else E_INPUT naming them */
    bool force;
    bool dense; /* 16-bit weights: of the plan, its factors alone */
} pack_opts;

typedef struct {
    bool fresh; /* the directory was there already, made from this model and plan */
    uint64_t bytes;
    int64_t tensors;
    int32_t group;
} pack_summary;

err_code pack_memory(memory_plan *p, device *d, const pack_opts *o, err *e);
/* Nothing appears under out_dir unless all of it was written. */
err_code pack_run(pack_summary *out, device *d, const pack_opts *o, const job *j, err *e);
/* Makes one tensor of the finished out_dir again and compares bytes: a full name
 * ("model.layers.3.mlp.up_proj.qweight", "...scales", "...weight") or a linear without suffix for
 * all its parts. E_CHECK naming the first place that differs; E_USAGE when there is no such tensor.
 */
err_code pack_compare(device *d, const pack_opts *o, const char *tensor_name, err *e);

#endif
