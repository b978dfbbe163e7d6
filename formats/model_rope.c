/* Rotary frequencies with the four scalings in use. Every step is taken in f32 in the order in
 * which the transformers library takes it, so that angles at position 100,000 agree: there an error
 * of one part in 10^7 of a frequency is already a hundredth of a radian. */
#include "formats/model.h"

#include <math.h>

/* base^(2i/dims), the power rounded once to f32. */
static float rope_period(float base, int i, int dims)
{
    const float exponent = (float)(2 * i) / (float)dims;
    return (float)pow((double)base, (double)exponent);
}

/* The base grows with the length beyond the trained one. */
static float rope_dynamic_base(const model_desc *m, int32_t n_tokens)
{
    const double d = m->rope_dims, max = m->max_tokens, factor = (double)m->scaling.factor;
    const double n = n_tokens > m->max_tokens ? n_tokens : max;
    return (float)((double)m->rope_theta * pow(factor * n / max - (factor - 1.0), d / (d - 2.0)));
}

/* Long waves are stretched by the factor, short ones stay, those between are mixed. */
static float rope_llama3(const rope_scaling *s, float f)
{
    const float len = (float)s->original_max_positions;
    const float low_wave = (float)((double)len / (double)s->low_freq_factor);
    const float high_wave = (float)((double)len / (double)s->high_freq_factor);
    const float wave = (float)(2.0 * M_PI) / f;
    if (wave < high_wave) return f;
    if (wave > low_wave) return f / s->factor;
    const float smooth = (len / wave - s->low_freq_factor) /
                         (s->high_freq_factor - s->low_freq_factor);
    return (1.0f - smooth) * f / s->factor + smooth * f;
}

/* The (fractional) dimension whose wave turns `turns` times over the trained length. */
static double yarn_dim(const model_desc *m, double turns)
{
    const double len = m->scaling.original_max_positions;
    return m->rope_dims * log(len / (turns * 2.0 * M_PI)) / (2.0 * log((double)m->rope_theta));
}

static void rope_yarn(const model_desc *m, float *inv_freq)
{
    const double low = fmax(floor(yarn_dim(m, (double)m->scaling.beta_fast)), 0);
    double high = fmin(ceil(yarn_dim(m, (double)m->scaling.beta_slow)), m->rope_dims - 1);
    if (low == high) high += 0.001;
    for (int i = 0; i < m->rope_dims / 2; i++) {
        const float period = rope_period(m->rope_theta, i, m->rope_dims);
        float ramp = ((float)i - (float)low) / (float)(high - low);
        ramp = ramp < 0.0f ? 0.0f : ramp > 1.0f ? 1.0f : ramp;
        const float keep = 1.0f - ramp;
        inv_freq[i] = 1.0f / (m->scaling.factor * period) * (1.0f - keep) + 1.0f / period * keep;
    }
}

static float yarn_mscale(const rope_scaling *s)
{
    if (s->attention_factor > 0) return s->attention_factor;
    return s->factor <= 1 ? 1.0f : (float)(0.1 * log((double)s->factor) + 1.0);
}

void model_inv_freq(const model_desc *m, int32_t n_tokens, float *inv_freq, float *mscale)
{
    const rope_scaling *s = &m->scaling;
    *mscale = 1.0f;
    if (s->kind == ROPE_YARN) {
        rope_yarn(m, inv_freq);
        *mscale = yarn_mscale(s);
        return;
    }
    const float base = s->kind == ROPE_DYNAMIC ? rope_dynamic_base(m, n_tokens) : m->rope_theta;
    for (int i = 0; i < m->rope_dims / 2; i++) {
        const float f = 1.0f / rope_period(base, i, m->rope_dims);
        if (s->kind == ROPE_LLAMA3)
            inv_freq[i] = rope_llama3(s, f);
        else
            inv_freq[i] = s->kind == ROPE_LINEAR ? f / s->factor : f;
    }
}
