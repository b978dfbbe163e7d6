/* Statistics of what reads the residual stream where that is turned: those of the calib file are of
 * other channels. They come from H of the bound block, which a search gathers anyway. */
#ifndef TMF_AWQ_STREAM_STATS_H
#define TMF_AWQ_STREAM_STATS_H

#include "awq/method.h"

/* Of b->mem: what stream_stats adds. */
size_t stream_stats_bytes(const model_desc *m);
/* Blocks of H and sums of magnitudes of the inputs of qkv and gate, all channels as they are now,
 * in place of those in *stats. A turned channel is a sum over all channels, so that its mean
 * magnitude is taken for a normal variable's: sqrt(2 / pi) rms. Largest magnitudes are left out
 * (no data). b: bound, its moments those of this layer. */
err_code stream_stats(const quant_block *b, calib_block *stats, err *e);

#endif
