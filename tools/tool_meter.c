/* The meter: on a terminal one line, redrawn at most 6 times a second and cleared before anything
 * else is written; elsewhere one whole line each 10 s; as JSON one object a line for programs. */
#include "tools/tool_meter.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "tools/tool.h"

#define METER_TTY_S   (1.0 / 6)
#define METER_LINE_S  10.0
#define METER_FIRST_S 0.5 /* a stage that ends sooner shows nothing on a terminal */

static struct {
    const char *tool;
    meter_kind kind;
    bool drawn; /* a progress line stands on the terminal */
    char stage[64];
    double began, shown; /* seconds: of this stage, of the last line */
    int64_t done0; /* done at the first step of the stage: a resumed run does not start at 0 */
    volatile sig_atomic_t wanted;
} meter;

void tool_meter_init(const char *tool, const char *how, bool quiet)
{
    const char *term = getenv("TERM");
    const bool tty = isatty(STDERR_FILENO) && term && strcmp(term, "dumb") != 0;
    memset(&meter, 0, sizeof meter);
    meter.tool = tool;
    if (strcmp(how, "json") == 0)
        meter.kind = METER_JSON;
    else if (strcmp(how, "none") == 0 || quiet)
        meter.kind = METER_NONE;
    else
        meter.kind = tty ? METER_TTY : METER_LINES;
}

void tool_meter_status_wanted(void) { meter.wanted = 1; }

void tool_progress_clear(void)
{
    if (!meter.drawn) return;
    (void)fputs("\r\033[K", stderr);
    (void)fflush(stderr);
    meter.drawn = false;
}

void tool_meter_log(void *ud, log_level level, const char *line)
{
    (void)ud;
    tool_progress_clear();
    (void)fprintf(stderr, "%s: %s%s\n", meter.tool, level == LOG_WARN ? "warning: " : "", line);
}

void tool_meter_time(char *buf, size_t cap, double seconds)
{
    const long long s = seconds < 0 ? 0 : seconds > 359999 ? 359999 : (long long)(seconds + 0.5);
    if (s >= 3600)
        (void)snprintf(buf, cap, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
    else
        (void)snprintf(buf, cap, "%lld:%02lld", s / 60, s % 60);
}

/* "12.5 layers/s" or, below one a second, "3.4 s/layer". */
static void meter_rate(char *buf, size_t cap, double rate, const char *unit)
{
    if (rate <= 0)
        buf[0] = '\0';
    else if (rate >= 1)
        (void)snprintf(buf, cap, ", %.*f %s/s", rate < 100 ? 1 : 0, rate, unit);
    else
        (void)snprintf(buf, cap, ", %.1f s/%s", 1 / rate, unit);
}

static void meter_text(char *buf, size_t cap, const job_progress *p, double rate, double elapsed)
{
    char speed[64], spent[32], left[32], share[16] = "", total[32] = "";
    meter_rate(speed, sizeof speed, rate, p->unit);
    tool_meter_time(spent, sizeof spent, elapsed);
    if (p->total > 0) {
        (void)snprintf(total, sizeof total, "/%lld", (long long)p->total);
        (void)snprintf(share, sizeof share, " (%d %%)",
                       (int)(100.0 * (double)p->done / (double)p->total));
    }
    int n = snprintf(buf, cap, "%s: %s: %s %lld%s%s%s, %s elapsed", meter.tool, p->stage, p->unit,
                     (long long)p->done, total, share, speed, spent);
    if (p->total > p->done && rate > 0 && n > 0 && (size_t)n < cap) {
        tool_meter_time(left, sizeof left, (double)(p->total - p->done) / rate);
        (void)snprintf(buf + n, cap - (size_t)n, ", %s left", left);
    }
}

static void meter_draw(const char *text)
{
    struct winsize w;
    int columns = 80;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col > 20) columns = w.ws_col;
    (void)fprintf(stderr, "\r%.*s\033[K", columns - 1, text);
    (void)fflush(stderr);
    meter.drawn = true;
}

static void meter_json(const job_progress *p, double rate, double elapsed)
{
    const double eta = rate > 0 && p->total > p->done ? (double)(p->total - p->done) / rate : 0;
    (void)fprintf(stderr,
                  "{\"stage\":\"%s\",\"unit\":\"%s\",\"done\":%lld,\"total\":%lld,\"rate\":%.6g,"
                  "\"elapsed_s\":%.3f,\"eta_s\":%.3f}\n",
                  p->stage, p->unit, (long long)p->done, (long long)p->total, rate, elapsed, eta);
}

/* Whether this step is to be shown; keeps the times of the stage. */
static bool meter_due(const job_progress *p, double now)
{
    if (strcmp(meter.stage, p->stage) != 0) {
        (void)snprintf(meter.stage, sizeof meter.stage, "%s", p->stage);
        meter.began = now;
        meter.done0 = p->done;
        meter.shown = meter.kind == METER_LINES ? now : 0;
    }
    if (meter.wanted) return true;
    const double since = now - meter.shown;
    switch (meter.kind) {
    case METER_TTY: return now - meter.began >= METER_FIRST_S && since >= METER_TTY_S;
    case METER_LINES: return since >= METER_LINE_S;
    case METER_JSON: return since >= METER_TTY_S || p->done == p->total;
    default: return false;
    }
}

void tool_meter_progress(void *ud, const job_progress *p)
{
    char text[512];
    (void)ud;
    const double now = tool_seconds();
    if (!meter_due(p, now)) {
        if (p->total > 0 && p->done >= p->total) tool_progress_clear();
        return;
    }
    const double elapsed = now - meter.began;
    const double rate = elapsed > 0 ? (double)(p->done - meter.done0) / elapsed : 0;
    meter.shown = now;
    if (meter.kind == METER_JSON) {
        meter_json(p, rate, elapsed);
    } else {
        meter_text(text, sizeof text, p, rate, elapsed);
        if (meter.kind == METER_TTY && !meter.wanted) {
            meter_draw(text);
        } else {
            tool_progress_clear();
            (void)fprintf(stderr, "%s\n", text);
        }
    }
    meter.wanted = 0;
}
