/* Steps of a layer by the time that they took in the layer before. */
#include "awq/pace.h"

#include "runtime/clock.h"

#define GUESSED 16 /* steps of a layer, while nothing is known */

pace pace_open(const job *j, const char *stage, int64_t windows, int64_t total)
{
    return (pace){.j = j,
                  .stage = stage,
                  .unit = windows > 1 ? "window" : "layer",
                  .windows = windows,
                  .total = total};
}

void pace_layer(pace *p, int64_t layer)
{
    p->base = layer * p->windows;
    p->began = clock_s();
    p->steps = 0;
}

/* Of the layer, behind `step`. */
static double share_of(const pace *p, int step)
{
    if (step < 0) return 0;
    if (step < p->known) return p->share[step];
    const double most = p->known ? p->share[p->known - 1] : 0, guess = (double)(step + 1) / GUESSED;
    return most > guess ? most : guess < 1 ? guess : 1;
}

void pace_step(pace *p)
{
    if (!p || p->steps == PACE_STEPS) return;
    p->reached[p->steps] = clock_s() - p->began;
    const double share = share_of(p, p->steps++);
    job_step(p->j, p->stage, p->unit, p->base + (int64_t)(share * (double)p->windows), p->total);
}

void pace_end(pace *p)
{
    const double took = clock_s() - p->began;
    for (int i = 0; i < p->steps && took > 0; i++) p->share[i] = p->reached[i] / took;
    if (took > 0) p->known = p->steps;
    job_step(p->j, p->stage, p->unit, p->base + p->windows, p->total);
}

walk_progress pace_pass(const pace *p)
{
    const double from = share_of(p, p->steps - 1), to = share_of(p, p->steps);
    return (walk_progress){.j = p->j,
                           .stage = p->stage,
                           .base = p->base + (int64_t)(from * (double)p->windows),
                           .total = p->total,
                           .each = to > from ? to - from : 1e-9};
}
