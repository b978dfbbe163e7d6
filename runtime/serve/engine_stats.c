/* Counters and histograms of the engine. */
#include <string.h>

#include "runtime/serve/engine_internal.h"

#define BOUNDS (ENGINE_BUCKETS - 1)

void engine_stats_begin(engine_stats *s)
{
    static const double seconds[BOUNDS] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
                                           0.5,   1,      2.5,   5,    10,    30,   120};
    static const double sizes[BOUNDS] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256};
    engine_histogram *times[] = {&s->queue_s, &s->prefill_s, &s->ttft_s, &s->inter_token_s,
                                 &s->e2e_s};
    memset(s, 0, sizeof *s);
    for (size_t i = 0; i < sizeof times / sizeof *times; i++)
        memcpy(times[i]->bounds, seconds, sizeof seconds);
    memcpy(s->batch.bounds, sizes, sizeof sizes);
}

void engine_observe(engine_histogram *h, double x)
{
    int i = BOUNDS;
    while (i > 0 && x <= h->bounds[i - 1]) h->count[i--]++;
    h->count[i]++;
    h->sum += x;
}
