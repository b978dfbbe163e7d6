/* The report as one page: tables, and charts as inline SVG. Nothing is loaded and nothing runs. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "awq/report.h"
#include "base/file.h"

enum { WIDE = 720, HIGH = 260, LEFT = 56, RIGHT = 12, TOP = 12, BOTTOM = 28 };

typedef struct {
    file_writer *w;
    err *e;
    err_code rc; /* sticks */
} page;

static void put(page *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void put(page *p, const char *fmt, ...)
{
    char text[2048];
    va_list args;
    va_start(args, fmt);
    const int n = vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    if (p->rc == OK) p->rc = file_writer_write(p->w, text, (size_t)n, p->e);
}

static const char *const colours[PLAN_LINEARS] = {"#4269d0", "#efb118", "#ff725c", "#6cc5b0",
                                                  "#3ca951", "#ff8ab7", "#a463f2"};

static const char head[] =
    "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>awq-search</title>\n"
    "<meta name=\"viewport\" content=\"width=device-width\">\n<style>\n"
    ":root{color-scheme:light dark}\n"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}\n"
    "h2{font-size:1.1rem;margin:2rem 0 .5rem}\n"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}\n"
    "th,td{text-align:right;padding:.15rem .6rem;border-bottom:1px solid #8884}\n"
    "th:first-child,td:first-child{text-align:left}\n"
    "svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:currentColor}\n"
    ".key span{margin-right:1rem;white-space:nowrap}.scroll{overflow-x:auto}\n"
    "</style></head><body>\n";

/* ---- charts ---- */

typedef double (*value_fn)(const report_linear *l);
static double share_left(const report_linear *l)
{
    return l->before > 0 ? 100 * l->after / l->before : 100;
}
static double magnitude(const report_linear *l) { return log10(fmax(l->after, 1e-12)); }

static void bounds(const report *r, value_fn value, double *lo, double *hi)
{
    *lo = INFINITY;
    *hi = -INFINITY;
    for (int32_t l = 0; l < r->layers; l++)
        for (int i = 0; i < r->layer[l].n_linears; i++) {
            *lo = fmin(*lo, value(&r->layer[l].linear[i]));
            *hi = fmax(*hi, value(&r->layer[l].linear[i]));
        }
    if (!(*hi > *lo)) *hi = *lo + 1;
}

static double x_of(const report *r, int32_t layer)
{
    return LEFT + (WIDE - LEFT - RIGHT) * (r->layers > 1 ? (double)layer / (r->layers - 1) : 0.5);
}

static double y_of(double v, double lo, double hi)
{
    return TOP + (HIGH - TOP - BOTTOM) * (hi - v) / (hi - lo);
}

static void axes(page *p, const report *r, double lo, double hi, const char *format)
{
    for (int i = 0; i <= 4; i++) {
        const double v = lo + (hi - lo) * i / 4, y = y_of(v, lo, hi);
        char text[32];
        (void)snprintf(text, sizeof text, format[0] == '%' ? "%.0f %%" : "1e%.1f", v);
        put(p,
            "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#8884\"/>"
            "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n",
            LEFT, WIDE - RIGHT, y, y, LEFT - 6, y + 4, text);
    }
    const int32_t step = (r->layers + 15) / 16;
    for (int32_t l = 0; l < r->layers; l += step)
        put(p, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%d</text>\n", x_of(r, l), HIGH - 8,
            (int)l);
}

static void chart(page *p, const report *r, const char *title, value_fn value, const char *format)
{
    const report_layer *first = r->layer;
    double lo, hi;
    bounds(r, value, &lo, &hi);
    if (format[0] == '%') lo = 0;
    put(p, "<h2>%s</h2>\n<p class=\"key\">", title);
    for (int i = 0; i < first->n_linears; i++)
        put(p, "<span style=\"color:%s\">&#9632; %s</span>", colours[i],
            role_name(first->linear[i].role));
    put(p, "</p>\n<svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"%s\">\n", WIDE, HIGH, title);
    axes(p, r, lo, hi, format);
    for (int i = 0; i < first->n_linears; i++) {
        put(p, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\" points=\"", colours[i]);
        for (int32_t l = 0; l < r->layers; l++)
            put(p, "%.1f,%.1f ", x_of(r, l), y_of(value(&r->layer[l].linear[i]), lo, hi));
        put(p, "\"/>\n");
        for (int32_t l = 0; l < r->layers; l++) {
            const report_linear *x = &r->layer[l].linear[i];
            put(p,
                "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"><title>layer %d, %s: %.4g of "
                "%.4g</title></circle>\n",
                x_of(r, l), y_of(value(x), lo, hi), colours[i], (int)l, role_name(x->role),
                x->after, x->before);
        }
    }
    put(p, "</svg>\n");
}

/* ---- tables ---- */

static void linears(page *p, const report *r)
{
    put(p, "<h2>Linears</h2>\n<div class=\"scroll\"><table><tr><th>layer</th><th>linear</th>"
           "<th>shape</th><th>loss, plain rounding</th><th>loss</th><th>left</th>"
           "<th>range kept</th></tr>\n");
    for (int32_t l = 0; l < r->layers; l++)
        for (int i = 0; i < r->layer[l].n_linears; i++) {
            const report_linear *x = &r->layer[l].linear[i];
            put(p,
                "<tr><td>%d</td><td>%s%s</td><td>%lld &times; %lld</td><td>%.5g</td><td>%.5g</td>"
                "<td>%.1f %%</td><td>%.1f %%</td></tr>\n",
                (int)l, role_name(x->role), x->few ? ", few tokens" : "", (long long)x->n,
                (long long)x->k, x->before, x->after, share_left(x), 100 * x->kept);
        }
    put(p, "</table></div>\n");
}

static void factors(page *p, const report *r)
{
    put(p, "<h2>Channel factors</h2>\n<p>Ratio: the power of an input's mean magnitude that the "
           "factors come nearest to.</p>\n<div class=\"scroll\"><table><tr><th>layer</th>"
           "<th>source</th><th>ratio</th><th>least</th><th>most</th></tr>\n");
    for (int32_t l = 0; l < r->layers; l++)
        for (int i = 0; i < r->layer[l].n_factors; i++) {
            const report_factors *x = &r->layer[l].factors[i];
            put(p, "<tr><td>%d</td><td>%s</td>", (int)l, role_name(x->source));
            if (isfinite(x->ratio))
                put(p, "<td>%.2f</td>", x->ratio);
            else
                put(p, "<td></td>");
            put(p, "<td>%.3g</td><td>%.3g</td></tr>\n", x->least, x->most);
        }
    put(p, "</table></div>\n");
}

static void outliers(page *p, const report *r)
{
    put(p,
        "<h2>Outlier channels</h2>\n<p>Largest magnitude, as times the median channel's.</p>\n"
        "<div class=\"scroll\"><table><tr><th>layer</th><th>input of</th>"
        "<th colspan=\"%d\">channel: times</th></tr>\n",
        REPORT_OUTLIERS);
    for (int32_t l = 0; l < r->layers; l++)
        for (int i = 0; i < r->layer[l].n_inputs; i++) {
            const report_input *x = &r->layer[l].input[i];
            put(p, "<tr><td>%d</td><td>%s</td>", (int)l, role_name(x->tap));
            for (int k = 0; k < REPORT_OUTLIERS && x->channel[k] >= 0; k++)
                put(p, "<td>%d: %.1f</td>", (int)x->channel[k], x->times[k]);
            put(p, "</tr>\n");
        }
    put(p, "</table></div>\n");
}

static void summary(page *p, const report *r)
{
    double before = 0, after = 0;
    for (int32_t l = 0; l < r->layers; l++)
        for (int i = 0; i < r->layer[l].n_linears; i++) {
            before += r->layer[l].linear[i].before;
            after += r->layer[l].linear[i].after;
        }
    put(p,
        "<h1>awq-search: %s</h1>\n<p>4 bits, groups of %d, %d layers. Loss (%s): %.5g, %.1f %% of "
        "plain rounding's %.5g.</p>\n",
        r->method, (int)r->group, (int)r->layers, r->loss, after,
        before > 0 ? 100 * after / before : 100., before);
    const prediction *q = &r->predicted;
    if (q->windows)
        put(p,
            "<p>Perplexity over %d held-out calibration windows: %.4f with 16-bit weights, %.4f "
            "rounded (%+.2f %%).</p>\n",
            (int)q->windows, exp(q->nll16), exp(q->nll), 100 * (exp(q->nll - q->nll16) - 1));
    const basis_choice *c = &r->basis;
    if (c->compared)
        put(p,
            "<p>Residual stream: %s. KL divergence from the 16-bit model over these windows: %.5f "
            "nats a token as it is, %.5f turned (%.5f &plusmn; %.5f less); perplexity %.4f and "
            "%.4f.</p>\n",
            r->turned ? "turned" : "as it is", c->still.kl, c->other.kl, c->gain, c->error,
            exp(c->still.nll), exp(c->other.nll));
    else if (r->turned)
        put(p, "<p>Residual stream: turned.</p>\n");
}

err_code report_html(const report *r, const char *path, bool force, err *e)
{
    page p = {.e = e};
    TRY(file_writer_open(&p.w, path, force, e));
    put(&p, "%s", head);
    summary(&p, r);
    chart(&p, r, "Loss left of plain rounding's, by layer", share_left, "%");
    chart(&p, r, "Loss by layer", magnitude, "log");
    linears(&p, r);
    if (r->layer[0].n_inputs) outliers(&p, r);
    factors(&p, r);
    put(&p, "</body></html>\n");
    if (p.rc == OK) return file_writer_commit(&p.w, e);
    file_writer_abort(&p.w);
    return p.rc;
}
