/* Where the angles and matrices of kv_turn.h come from. */
#include "awq/kv_turn.h"

#include <math.h>
#include <string.h>

#include "awq/fold.h"
#include "awq/lapack.h"

#define STANDS_OUT 0.3  /* a pair's mean, of its rms */
#define LEAST      1e-3 /* added to c and g, of their mean diagonal */

static const double pi = 3.14159265358979323846;

/* ---- keys ---- */

void kv_turn_angles(const model_desc *m, const float *x, int64_t n, float *angle)
{
    const int64_t hd = m->head_dim;
    for (int64_t i = 0; i < m->rope_dims / 2; i++) {
        double sa = 0, sb = 0, square = 0;
        int64_t a, b;
        fold_rope_pair(m, i, &a, &b);
        for (int64_t t = 0; t < n; t++) {
            const double u = x[t * hd + a], v = x[t * hd + b];
            sa += u;
            sb += v;
            square += u * u + v * v;
        }
        const double mean = hypot(sa, sb) / (double)n, rms = sqrt(square / (double)n);
        angle[i] = mean > STANDS_OUT * rms ? (float)(pi / 4 - atan2(sb, sa)) : 0;
    }
}

void kv_turn_pairs(const model_desc *m, float *x, int64_t n, const float *angle)
{
    for (int64_t i = 0; i < m->rope_dims / 2; i++) {
        const float c = (float)cos((double)angle[i]), s = (float)sin((double)angle[i]);
        int64_t a, b;
        fold_rope_pair(m, i, &a, &b);
        for (int64_t t = 0; t < n; t++) {
            float *p = x + t * m->head_dim;
            const float u = p[a], v = p[b];
            p[a] = u * c - v * s;
            p[b] = v * c + u * s;
        }
    }
}

/* ---- values ---- */

int64_t kv_turn_work(int64_t hd) { return 4 * hd * hd + 40 * hd; }

/* l = lower factor of c with LEAST on its diagonal. */
static bool cholesky(const float *c, double *l, int64_t n)
{
    double trace = 0;
    for (int64_t i = 0; i < n; i++) trace += c[i * n + i];
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            double s = c[i * n + j] + (i == j ? LEAST * trace / (double)n : 0);
            for (int64_t k = 0; k < j; k++) s -= l[i * n + k] * l[j * n + k];
            if (i == j && !(s > 0 && isfinite(s))) return false;
            l[i * n + j] = i == j ? sqrt(s) : s / l[j * n + j];
        }
    return true;
}

/* a = l^T g l, t: scratch. */
static void between(const float *g, const double *l, double *t, double *a, int64_t n)
{
    double trace = 0;
    for (int64_t i = 0; i < n; i++) trace += g[i * n + i];
    memset(t, 0, (size_t)(n * n) * sizeof *t);
    memset(a, 0, (size_t)(n * n) * sizeof *a);
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < n; k++) {
            const double v = g[i * n + k] + (i == k ? LEAST * trace / (double)n : 0);
            for (int64_t j = 0; j <= k; j++) t[i * n + j] += v * l[k * n + j];
        }
    for (int64_t k = 0; k < n; k++)
        for (int64_t i = 0; i <= k; i++)
            for (int64_t j = 0; j < n; j++) a[i * n + j] += l[k * n + i] * t[k * n + j];
}

/* x = l^-T x, x [n,n]. */
static void solve_upper(const double *l, double *x, int64_t n)
{
    for (int64_t i = n - 1; i >= 0; i--) {
        for (int64_t k = i + 1; k < n; k++)
            for (int64_t j = 0; j < n; j++) x[i * n + j] -= l[k * n + i] * x[k * n + j];
        for (int64_t j = 0; j < n; j++) x[i * n + j] /= l[i * n + i];
    }
}

/* Row r, column j of the orthogonal DCT-II; row 0 is constant. */
static double cosine(int64_t r, int64_t j, int64_t n)
{
    return sqrt((r ? 2. : 1.) / (double)n) * cos(pi * (double)r * ((double)j + 0.5) / (double)n);
}

/* m = l^-T U diag(d) T, inverse = T^T diag(1/d) U^T l^T; U's columns are the rows of u from the
 * last on, t is T, x scratch. */
static void compose(const double *l, const double *u, const double *d, const double *t, double *x,
                    int64_t n, float *m, float *inverse)
{
    memset(x, 0, (size_t)(n * n) * sizeof *x);
    for (int64_t i = 0; i < n; i++)
        for (int64_t r = 0; r < n; r++) {
            const double v = u[(n - 1 - r) * n + i] * d[r];
            for (int64_t j = 0; j < n; j++) x[i * n + j] += v * t[r * n + j];
        }
    solve_upper(l, x, n);
    for (int64_t i = 0; i < n * n; i++) m[i] = (float)x[i];
    memset(x, 0, (size_t)(n * n) * sizeof *x);
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < n; i++) {
            double v = 0;
            for (int64_t k = 0; k <= i; k++) v += u[(n - 1 - r) * n + k] * l[i * n + k];
            for (int64_t j = 0; j < n; j++) x[j * n + i] += t[r * n + j] / d[r] * v;
        }
    for (int64_t i = 0; i < n * n; i++) inverse[i] = (float)x[i];
}

bool kv_turn_matrix(const float *c, const float *g, int64_t hd, float *m, float *inverse,
                    double *work)
{
    const int n = (int)hd, lwork = 32 * n;
    double *l = work, *u = l + hd * hd, *t = u + hd * hd, *x = t + hd * hd, *w = x + hd * hd,
           *d = w + hd, *more = d + hd, spread = 0, was = 0;
    int info;
    if (!cholesky(c, l, hd)) return false;
    between(g, l, t, u, hd);
    dsyev_("V", "U", &n, u, &n, w, more, &lwork, &info); /* row r of u: the vector of w[r] */
    if (info != 0 || !(w[0] > 0 && isfinite(w[n - 1]))) return false;
    for (int64_t i = 0; i < hd; i++) {
        spread += sqrt(w[i]);
        was += c[i * hd + i];
    }
    for (int64_t i = 0; i < hd; i++) /* v keeps its size */
        d[i] = sqrt(sqrt(w[hd - 1 - i]) * was / spread);
    for (int64_t r = 0; r < hd; r++)
        for (int64_t j = 0; j < hd; j++) t[r * hd + j] = cosine(r, j, hd);
    compose(l, u, d, t, x, hd, m, inverse);
    return true;
}
