/* tm-run chat: a conversation in the terminal, or one answer where standard input is no terminal.
 */
#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "tools/chat_app.h"

#define INTERRUPT_S 2.0 /* Ctrl-C twice within this at the prompt leaves */
#define CHAT_SESSION \
    8192 /* tokens by default: models of long contexts would plan gigabytes of cache */

static struct {
    const char *prompt, *load;
    run_chat_opts chat;
    int64_t max_new;
    cli_list stop;
    bool stats, double_enter, no_history, drop_oldest;
    run_sample_opts sample;
    run_model_opts model;
} opt = {.max_new = 1024, .sample = RUN_SAMPLE_DEFAULTS, .model = RUN_MODEL_DEFAULTS};

static const cli_option options[] = {
    {"prompt", 'p', CLI_STR, &opt.prompt, "TEXT",
     "answer this and end; what standard input brings is put behind it"},
    RUN_CHAT_OPTIONS(opt.chat),
    {"max-new-tokens", 0, CLI_I64, &opt.max_new, "N",
     "of an answer, 0: until the session is full [1024]", .lo = 0, .hi = 1 << 24},
    {"stop", 0, CLI_LIST, &opt.stop, "TEXT", "also stop where an answer has this text; repeatable"},
    {"load", 0, CLI_STR, &opt.load, "FILE", "go on with a conversation that /save wrote"},
    {"stats", 0, CLI_FLAG, &opt.stats, NULL,
     "time to the first token, tokens a second, context used"},
    {"drop-oldest", 0, CLI_FLAG, &opt.drop_oldest, NULL, "a full session forgets its oldest turns"},
    {"double-enter", 0, CLI_FLAG, &opt.double_enter, NULL, "a message ends at an empty line"},
    {"no-history", 0, CLI_FLAG, &opt.no_history, NULL, "keep no history of what was typed"},
    RUN_SAMPLE_OPTIONS(opt.sample),
    RUN_MODEL_OPTIONS(opt.model),
};

void chat_app_note(const chat_app *a, const char *fmt, ...)
{
    va_list args;
    if (a->t->job.level < LOG_INFO) return; /* -q */
    va_start(args, fmt);
    (void)vfprintf(stderr, fmt, args);
    (void)fputc('\n', stderr);
    va_end(args);
}

void chat_app_stats(const chat_app *a)
{
    const gen_result *r = &a->last;
    (void)fprintf(
        stderr,
        "%d tokens read in %.2f s, %d written at %.1f tokens/s; context %lld of %d tokens\n",
        r->n_prompt, r->prompt_s, r->n_new, r->n_new > 1 ? (r->n_new - 1) / r->new_s : 0.0,
        (long long)a->s.ids.n, model_session_len(a->r.m));
}

/* ---- answers ---- */

static bool add_text(cJSON *o, const char *text, size_t n)
{
    void *copy;
    err ignored;
    if (mem_alloc(&copy, n + 1, 1, "event", &ignored) != OK) return false;
    memcpy(copy, text, n);
    const bool added = cJSON_AddStringToObject(o, "text", copy);
    mem_free(copy);
    return added;
}

/* One line of JSON. r, text: left out when NULL; id: when negative. */
static err_code event(const char *name, const gen_result *r, const char *text, size_t n, int32_t id,
                      err *e)
{
    cJSON *o = cJSON_CreateObject();
    bool filled = o && cJSON_AddStringToObject(o, "event", name);
    if (text) filled = filled && add_text(o, text, n);
    if (id >= 0) filled = filled && cJSON_AddNumberToObject(o, "id", id);
    if (r)
        filled = filled && cJSON_AddStringToObject(o, "finish_reason", gen_end_name(r->end)) &&
                 cJSON_AddNumberToObject(o, "prompt_tokens", r->n_prompt) &&
                 cJSON_AddNumberToObject(o, "new_tokens", r->n_new) &&
                 cJSON_AddNumberToObject(o, "prompt_seconds", r->prompt_s) &&
                 cJSON_AddNumberToObject(o, "new_seconds", r->new_s);
    const err_code rc = run_json(o, filled, e);
    (void)fflush(stdout);
    return rc;
}

/* What a model writes must not drive the terminal: control bytes other than line end and tab are
 * shown as
 * '?'. C1 controls are two bytes in UTF-8 (c2 80..9f); their second byte is replaced as well. */
static void put_terminal(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const unsigned char c = (unsigned char)text[i];
        const bool c1 = c == 0xc2 && i + 1 < n && (unsigned char)text[i + 1] < 0xa0;
        if (c1) i++;
        (void)putchar(c1 || c == 0x7f || (c < 0x20 && c != '\n' && c != '\t') ? '?' : c);
    }
}

static bool on_token(void *ud, int32_t id, const char *text, size_t n)
{
    chat_app *a = ud;
    err e;
    if (a->t->json) return event("token", NULL, text, n, id, &e) == OK;
    if (a->plain)
        (void)fwrite(text, 1, n, stdout);
    else
        put_terminal(text, n);
    if (n) (void)fflush(stdout);
    return true;
}

static void end_note(const chat_app *a, const gen_result *r, int dropped)
{
    if (dropped)
        chat_app_note(a, "[the session was full: %d of the oldest turns were forgotten]", dropped);
    if (r->end == GEN_LENGTH)
        chat_app_note(a, "[cut at %d tokens; /set max-new-tokens allows more]", r->n_new);
    if (r->end == GEN_SESSION)
        chat_app_note(a,
                      "[the session of %d tokens is full: /clear begins anew, /undo takes the last "
                      "turn back]",
                      model_session_len(a->r.m));
    if (r->end == GEN_CANCELED) chat_app_note(a, "[stopped]");
}

err_code chat_app_ask(chat_app *a, const char *text, err *e)
{
    gen_result r;
    int dropped;
    if (a->t->json) TRY(event("start", NULL, NULL, 0, -1, e));
    const err_code rc = chat_session_ask(&a->s, text, on_token, a, &r, &dropped, &a->t->job, e);
    if (a->term && (rc == E_LIMIT || rc == E_INPUT)) {
        chat_app_note(a, "%s%s", e->msg,
                      rc == E_LIMIT ? " (/clear begins anew, /undo takes a turn back)" : "");
        return OK;
    }
    if (rc != OK) return rc;
    a->last = r;
    if (a->t->json) return event("end", &r, NULL, 0, -1, e);
    (void)putchar('\n');
    (void)fflush(stdout);
    end_note(a, &r, dropped);
    if (a->stats) chat_app_stats(a);
    return OK;
}

/* ---- the two ways ---- */

/* Ctrl-C: an answer stops and the chat goes on; at the prompt the line goes, and twice leaves.
 * SIGTERM and SIGHUP always leave. */
static err_code interrupted(chat_app *a, bool at_prompt, double *last, err *e)
{
    const double now = tool_seconds();
    if (at_prompt && now - *last < INTERRUPT_S) return err_set(e, E_CANCELED, "stopped");
    if (!tool_interrupt_take()) return err_set(e, E_CANCELED, "stopped");
    if (!at_prompt) return OK;
    (void)fputc('\n', stderr);
    chat_app_note(a, "(Ctrl-C again or Ctrl-D leaves)");
    *last = now;
    return OK;
}

static err_code talk(chat_app *a, err *e)
{
    double last_interrupt = -INTERRUPT_S;
    chat_app_note(a, "%s on %s. /help lists the commands, Ctrl-D leaves.", weights_path(a->r.src),
                  dev_name(a->r.d));
    while (!a->quit) {
        char *text;
        chat_input what;
        TRY(chat_terminal_read(a->term, &text, &what, e));
        if (what == CHAT_END) {
            (void)fputc('\n', stderr);
            return OK;
        }
        if (what == CHAT_INTERRUPT) {
            TRY(interrupted(a, true, &last_interrupt, e));
            continue;
        }
        last_interrupt = -INTERRUPT_S;
        const bool word = strcmp(text, "exit") == 0 || strcmp(text, "end") == 0;
        if (text[strspn(text, " \t\n")] == 0) continue;
        if (word || (text[0] == '/' && islower((unsigned char)text[1]) && !strchr(text, '\n')))
            TRY(chat_command_run(a, text, e));
        else
            TRY(chat_app_ask(a, text, e));
        if (job_check(&a->t->job, e) != OK) TRY(interrupted(a, false, &last_interrupt, e));
    }
    return OK;
}

/* One answer: -p TEXT, with standard input behind it unless that is a terminal. */
static err_code answer_once(chat_app *a, err *e)
{
    char *text = NULL;
    size_t n = 0;
    void *all;
    const char *prompt = opt.prompt ? opt.prompt : "";
    if (!isatty(STDIN_FILENO)) TRY(run_read_text(&text, &n, "-", e));
    while (n && (text[n - 1] == '\n' || text[n - 1] == '\r')) text[--n] = 0;
    const size_t cap = strlen(prompt) + n + 2;
    err_code rc = mem_alloc(&all, cap, 1, "message", e);
    if (rc == OK) {
        (void)snprintf(all, cap, "%s%s%s", prompt, *prompt && n ? "\n" : "", text ? text : "");
        rc = *(char *)all ? chat_app_ask(a, all, e) : err_set(e, E_USAGE, "the prompt is empty");
        if (rc == OK && a->last.end == GEN_CANCELED)
            rc = err_set(e, E_CANCELED, "stopped after %d tokens", a->last.n_new);
        mem_free(all);
    }
    mem_free(text);
    return rc;
}

static err_code converse(chat_app *a, err *e)
{
    logit_bias bias[RUN_MAX_BIAS];
    const char *off = getenv("NO_HISTORY");
    const chat_terminal_opts to = {opt.double_enter, !opt.no_history && !(off && *off),
                                   chat_command_names, a->t->job.stop};
    TRY(chat_session_open(&a->s, &a->r, a->c, opt.chat.meta, e));
    TRY(run_sample(&a->s.sample, &opt.sample, (uint64_t)a->t->seed, bias, e));
    TRY(sample_opts_check(&a->s.sample, model_desc_of(a->r.m)->vocab, e));
    a->s.max_new = opt.max_new;
    a->s.stop_texts = opt.stop;
    a->s.drop_oldest = opt.drop_oldest;
    a->stats = opt.stats;
    a->plain = !isatty(STDOUT_FILENO);
    if (opt.load) TRY(chat_session_load(&a->s, opt.load, e));
    if (opt.prompt || !isatty(STDIN_FILENO)) return answer_once(a, e);
    TRY(chat_terminal_open(&a->term, &to, e));
    return talk(a, e);
}

static err_code run(tool_ctx *t, err *e)
{
    chat_app a = {.t = t};
    err_code rc = run_open(&a.r, t, true, e);
    if (rc == OK) rc = run_chat_open(&a.c, &a.r, &opt.chat, t, e);
    if (rc == OK) {
        const int32_t context = weights_desc(a.r.src)->max_tokens;
        rc = run_model(&a.r, t, &opt.model, context < CHAT_SESSION ? context : CHAT_SESSION, 1, e);
    }
    if (rc == OK && a.r.m) rc = converse(&a, e);
    chat_terminal_close(&a.term);
    chat_session_close(&a.s);
    chat_close(&a.c);
    run_close(&a.r);
    return rc;
}

const tool_command tm_run_chat = {
    .name = "chat",
    .usage = "PATH [-p TEXT] [options]",
    .summary = "talks in the terminal; without one answers what standard input asks",
    .examples = "  tm-run chat model\n"
                "  tm-run chat workspace --quant-policy 8 --stats\n"
                "  git diff | tm-run chat model -p 'Write a commit message for this change:'\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_SEED | TOOL_JSON | TOOL_DRY_RUN,
    .min_args = 1,
    .max_args = 1,
    .run = run};
