/* A Hugging Face directory as a weight source: 16-bit (or f32) weights, or AWQ in GEMM layout,
 * decided tensor by tensor for the linears of an AWQ directory (modules that were not converted
 * stay dense). */
#ifndef TMF_FORMATS_HF_DIR_H
#define TMF_FORMATS_HF_DIR_H

#include "formats/weights.h"

/* All names, dtypes and shapes are checked here against config.json, so that a lie shows before any
 * work: E_INPUT for what is missing, there twice or there against the config's word (a bias);
 * E_SHAPE for another dtype or shape, naming file, tensor, expected and found; E_UNSUPPORTED as
 * hf_config.h and hf_shards.h say, and for GPTQ tensors. Weights stay mapped. Own memory is taken
 * only for scales that are not f16 and for tensors that the file does not align, when they are
 * first asked for, and kept until close; a scale that f16 does not hold is then E_INPUT. Not safe
 * for use by two threads at once. */
err_code hf_open(weight_src **out, const char *path, err *e);

#endif
