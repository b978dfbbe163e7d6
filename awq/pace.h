/* How far a layer has come, in windows of the whole search, so that what is done grows as time
 * does: steps of a layer are of very different cost, and each counts as it did in the layer
 * before. */
#ifndef TMF_AWQ_PACE_H
#define TMF_AWQ_PACE_H

#include "runtime/layer_walk.h"

enum { PACE_STEPS = 32 };

typedef struct pace {
    const job *j;
    const char *stage;
    const char *unit;
    int64_t windows, total; /* of a layer; of all layers */
    int64_t base;           /* at the layer's start */
    double began;           /* then, in seconds */
    double share[PACE_STEPS],
        reached[PACE_STEPS]; /* of the layer's time at the end of each step: as
                                                      far as is known; seconds, in this layer */
    int steps;               /* done in this layer */
    int known;               /* of share */
} pace;

/* windows 1: layers are counted. */
pace pace_open(const job *j, const char *stage, int64_t windows, int64_t total);
void pace_layer(pace *p, int64_t layer); /* begins */
/* One step further. p NULL: nothing. */
void pace_step(pace *p);
/* The layer is done: what its steps took is what the next one's count. */
void pace_end(pace *p);
/* For a pass over all windows that is the next step. */
walk_progress pace_pass(const pace *p);

#endif
