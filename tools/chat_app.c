/* The loop around a conversation: one answer where standard input is no terminal, else lines,
 * commands and Ctrl-C. Shared by tm-run chat and tm-run client. */
#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "tools/chat_app.h"

#define INTERRUPT_S 2.0 /* Ctrl-C twice within this at the prompt leaves */

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
    char room[32] = "";
    if (a->s.room) (void)snprintf(room, sizeof room, " of %d", a->s.room);
    (void)fprintf(stderr,
                  "%d tokens read in %.2f s, %d written at %.1f tokens/s; context %lld%s tokens\n",
                  r->n_prompt, r->prompt_s, r->n_new,
                  r->n_new > 1 ? (r->n_new - 1) / r->new_s : 0.0, (long long)a->s.context, room);
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
 * shown as '?'. C1 controls are two bytes in UTF-8 (c2 80..9f); their second byte is replaced as
 * well. */
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
    if (n) {
        (void)fflush(stdout);
        a->midline = text[n - 1] != '\n';
    }
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
                      a->s.room);
    if (r->end == GEN_CANCELED) chat_app_note(a, "[stopped]");
}

/* What a conversation in the terminal survives: a server may be back for the next question. */
static bool goes_on(const chat_app *a, err_code rc)
{
    if (a->s.remote) return rc != OK && rc != E_NOMEM && rc != E_CANCELED;
    return rc == E_LIMIT || rc == E_INPUT;
}

err_code chat_app_ask(chat_app *a, const char *text, err *e)
{
    gen_result r;
    int dropped;
    a->midline = false;
    if (a->t->json) TRY(event("start", NULL, NULL, 0, -1, e));
    const err_code rc = chat_session_ask(&a->s, text, on_token, a, &r, &dropped, &a->t->job, e);
    if (rc != OK && a->midline) { /* what follows on stderr begins a line */
        (void)putchar('\n');
        (void)fflush(stdout);
    }
    if (a->term && goes_on(a, rc)) {
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
static err_code answer_once(chat_app *a, const char *prompt, err *e)
{
    char *text = NULL;
    size_t n = 0;
    void *all;
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

err_code chat_app_run(chat_app *a, const chat_app_opts *o, err *e)
{
    const char *off = getenv("NO_HISTORY");
    const chat_terminal_opts to = {o->double_enter, !o->no_history && !(off && *off),
                                   chat_command_names, a->t->job.stop};
    TRY(chat_session_check(&a->s, e));
    a->stats = o->stats;
    a->plain = !isatty(STDOUT_FILENO);
    if (o->load) TRY(chat_session_load(&a->s, o->load, e));
    if (o->prompt || !isatty(STDIN_FILENO)) return answer_once(a, o->prompt ? o->prompt : "", e);
    TRY(chat_terminal_open(&a->term, &to, e));
    chat_app_note(a, "%s. /help lists the commands, Ctrl-D leaves.", o->hello);
    return talk(a, e);
}

void chat_app_close(chat_app *a)
{
    chat_terminal_close(&a->term);
    chat_session_close(&a->s);
}
