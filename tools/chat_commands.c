/* The commands of a chat: one row each. */
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "tools/chat_app.h"

typedef struct {
    const char *name, *arg, *help;
    err_code (*run)(chat_app *a, const char *arg, err *e);
} command;

/* ---- settings ---- */

typedef enum { SET_F64, SET_I32, SET_I64, SET_U64, SET_FLAG } set_kind;
typedef struct {
    const char *name, *help;
    set_kind kind;
    size_t at; /* in chat_app */
} setting;

#define SAMPLE(field) \
    offsetof(chat_app, s) + offsetof(chat_session, sample) + offsetof(sample_opts, field)
static const setting settings[] = {
    {"temperature", "0 is greedy", SET_F64, SAMPLE(temperature)},
    {"top-k", "0 is all", SET_I32, SAMPLE(top_k)},
    {"top-p", "1 is all", SET_F64, SAMPLE(top_p)},
    {"min-p", "0 is off", SET_F64, SAMPLE(min_p)},
    {"repetition-penalty", "1 is off", SET_F64, SAMPLE(repetition_penalty)},
    {"presence-penalty", "0 is off", SET_F64, SAMPLE(presence_penalty)},
    {"frequency-penalty", "0 is off", SET_F64, SAMPLE(frequency_penalty)},
    {"penalty-window", "0 is all", SET_I32, SAMPLE(penalty_window)},
    {"seed", "of the next answers", SET_U64, SAMPLE(seed)},
    {"max-new-tokens", "0 is until the session is full", SET_I64,
     offsetof(chat_app, s) + offsetof(chat_session, max_new)},
    {"drop-oldest", "a full session forgets its oldest turns", SET_FLAG,
     offsetof(chat_app, s) + offsetof(chat_session, drop_oldest)},
    {"stats", "figures behind each answer", SET_FLAG, offsetof(chat_app, stats)},
};
#define N_SETTINGS (sizeof settings / sizeof *settings)

/* A server's own choice: see chat_sample_unset. */
static bool is_unset(const chat_app *a, const setting *s)
{
    const void *p = (const char *)a + s->at;
    if (!a->s.remote) return false;
    if (s->kind == SET_F64) return isnan(*(const double *)p);
    if (s->kind == SET_I32) return *(const int32_t *)p < 0;
    return s->kind == SET_U64 && *(const uint64_t *)p == UINT64_MAX;
}

static bool unset(const chat_app *a, const setting *s, void *p)
{
    if (!a->s.remote) return false;
    if (s->kind == SET_F64) *(double *)p = NAN;
    if (s->kind == SET_I32) *(int32_t *)p = -1;
    if (s->kind == SET_U64) *(uint64_t *)p = UINT64_MAX;
    return s->kind == SET_F64 || s->kind == SET_I32 || s->kind == SET_U64;
}

static void setting_text(const chat_app *a, const setting *s, char *buf, size_t cap)
{
    const void *p = (const char *)a + s->at;
    if (is_unset(a, s)) {
        (void)snprintf(buf, cap, "server's");
        return;
    }
    switch (s->kind) {
    case SET_F64: (void)snprintf(buf, cap, "%g", *(const double *)p); break;
    case SET_I32: (void)snprintf(buf, cap, "%d", *(const int32_t *)p); break;
    case SET_I64: (void)snprintf(buf, cap, "%lld", (long long)*(const int64_t *)p); break;
    case SET_U64: (void)snprintf(buf, cap, "%llu", (unsigned long long)*(const uint64_t *)p); break;
    case SET_FLAG: (void)snprintf(buf, cap, "%s", *(const bool *)p ? "on" : "off"); break;
    }
}

/* Stores a value; false when the text is none of that kind. */
static bool setting_store(chat_app *a, const setting *s, const char *text)
{
    void *p = (char *)a + s->at;
    char *end;
    if (strcmp(text, "default") == 0) return unset(a, s, p);
    if (s->kind == SET_FLAG) {
        const bool on = strcmp(text, "on") == 0;
        if (!on && strcmp(text, "off") != 0) return false;
        *(bool *)p = on;
        return true;
    }
    errno = 0;
    const double x = strtod(text, &end);
    if (end == text || *end || errno) return false;
    if (s->kind == SET_F64) {
        *(double *)p = x;
        return true;
    }
    const double most = s->kind == SET_U64 ? 0x1p53 : 2147483647.0;
    if (!(x >= 0 && x <= most) || x != (double)(int64_t)x) return false;
    if (s->kind == SET_I32) *(int32_t *)p = (int32_t)x;
    if (s->kind == SET_I64) *(int64_t *)p = (int64_t)x;
    if (s->kind == SET_U64) *(uint64_t *)p = (uint64_t)x;
    return true;
}

static err_code show_settings(chat_app *a)
{
    char value[64];
    for (size_t i = 0; i < N_SETTINGS; i++) {
        setting_text(a, &settings[i], value, sizeof value);
        (void)fprintf(stderr, "  %-20s %-10s %s\n", settings[i].name, value, settings[i].help);
    }
    return OK;
}

static err_code set(chat_app *a, const char *arg, err *e)
{
    char name[32] = "", value[64] = "", now[64];
    (void)e;
    if (!*arg) return show_settings(a);
    if (sscanf(arg, "%31s %63s", name, value) < 1) return OK;
    if (strncmp(name, "parameter", 10) == 0 && sscanf(arg, "%*s %31s %63s", name, value) < 1)
        return OK;
    for (char *p = name; *p; p++) *p = *p == '_' ? '-' : *p;
    for (size_t i = 0; i < N_SETTINGS; i++) {
        const sample_opts old = a->s.sample;
        err wrong;
        if (strcmp(settings[i].name, name) != 0) continue;
        if (*value && !setting_store(a, &settings[i], value)) {
            chat_app_note(a, "/set %s: '%s' is no value for it", name, value);
            return OK;
        }
        if (chat_session_check(&a->s, &wrong) != OK) {
            a->s.sample = old;
            chat_app_note(a, "/set: %s", wrong.msg);
            return OK;
        }
        setting_text(a, &settings[i], now, sizeof now);
        chat_app_note(a, "%s is %s", name, now);
        return OK;
    }
    chat_app_note(a, "/set: unknown setting '%s'; /set alone lists them", name);
    return OK;
}

/* ---- conversation ---- */

static err_code clear(chat_app *a, const char *arg, err *e)
{
    (void)arg;
    (void)e;
    chat_session_clear(&a->s);
    chat_app_note(a, "new conversation");
    return OK;
}

static err_code undo(chat_app *a, const char *arg, err *e)
{
    (void)arg;
    (void)e;
    const bool done = chat_session_undo(&a->s, NULL);
    chat_app_note(a, done ? "the last turn is gone, %d left" : "there is no turn to take back",
                  a->s.n_turns);
    return OK;
}

static err_code regen(chat_app *a, const char *arg, err *e)
{
    char *user;
    (void)arg;
    if (!chat_session_undo(&a->s, &user)) {
        chat_app_note(a, "there is no answer to repeat");
        return OK;
    }
    const err_code rc = chat_app_ask(a, user, e);
    mem_free(user);
    return rc;
}

static err_code edit(chat_app *a, const char *arg, err *e)
{
    char *user;
    (void)arg;
    (void)e;
    if (!chat_session_undo(&a->s, &user)) {
        chat_app_note(a, "there is no question to edit");
        return OK;
    }
    if (a->term) chat_terminal_prefill(a->term, user);
    mem_free(user);
    return OK;
}

static err_code system_text(chat_app *a, const char *arg, err *e)
{
    const char *now = a->s.system ? a->s.system : a->s.meta;
    if (!*arg) {
        chat_app_note(a, "system text: %s", now ? now : "(the template's)");
        return OK;
    }
    TRY(chat_session_system(&a->s, arg, e));
    chat_app_note(a, "system text set; what was said stays");
    return OK;
}

/* A file's text as a message, with the rest of the line behind it. */
static err_code read_file(chat_app *a, const char *arg, err *e)
{
    char path[4096], *text;
    size_t n;
    err wrong;
    const size_t len = strcspn(arg, " ");
    if (len == 0 || len >= sizeof path) {
        chat_app_note(a, "/read FILE [TEXT]");
        return OK;
    }
    (void)snprintf(path, sizeof path, "%.*s", (int)len, arg);
    if (run_read_text(&text, &n, path, &wrong) != OK) {
        chat_app_note(a, "%s", wrong.msg);
        return OK;
    }
    void *all;
    const char *rest = arg + len + strspn(arg + len, " ");
    err_code rc = mem_alloc(&all, n + strlen(rest) + 2, 1, "message", e);
    if (rc == OK) {
        (void)snprintf(all, n + strlen(rest) + 2, "%s%s%s", text, *rest ? "\n" : "", rest);
        rc = chat_app_ask(a, all, e);
        mem_free(all);
    }
    mem_free(text);
    return rc;
}

static err_code save(chat_app *a, const char *arg, err *e)
{
    err wrong;
    (void)e;
    if (!*arg)
        chat_app_note(a, "/save FILE");
    else if (chat_session_save(&a->s, arg, &wrong) != OK)
        chat_app_note(a, "%s", wrong.msg);
    else
        chat_app_note(a, "wrote '%s': %d turns", arg, a->s.n_turns);
    return OK;
}

static err_code load(chat_app *a, const char *arg, err *e)
{
    err wrong;
    (void)e;
    if (!*arg)
        chat_app_note(a, "/load FILE");
    else if (chat_session_load(&a->s, arg, &wrong) != OK)
        chat_app_note(a, "%s", wrong.msg);
    else
        chat_app_note(a, "read '%s': %d turns", arg, a->s.n_turns);
    return OK;
}

static err_code stats(chat_app *a, const char *arg, err *e)
{
    (void)e;
    if (strcmp(arg, "on") == 0 || strcmp(arg, "off") == 0) {
        a->stats = arg[1] == 'n';
        chat_app_note(a, "stats is %s", arg);
    } else {
        chat_app_stats(a);
    }
    return OK;
}

static err_code show(chat_app *a, const char *arg, err *e)
{
    char text[1024];
    (void)arg;
    (void)e;
    a->s.b->show(a->s.b, text, sizeof text);
    chat_app_note(a, "%s", text);
    return show_settings(a);
}

static err_code quit(chat_app *a, const char *arg, err *e)
{
    (void)arg;
    (void)e;
    a->quit = true;
    return OK;
}

/* ---- table ---- */

static err_code help(chat_app *a, const char *arg, err *e);

static const command commands[] = {
    {"/help", "", "this list", help},
    {"/clear", "", "new conversation, same system text (also: end)", clear},
    {"/regen", "", "another answer to the last question", regen},
    {"/undo", "", "take the last question and answer back", undo},
    {"/edit", "", "take them back and edit the question", edit},
    {"/system", "TEXT", "another system text; alone: show it", system_text},
    {"/set", "NAME VALUE", "sampling and limits; alone: list them", set},
    {"/show", "", "model, cache, template, settings", show},
    {"/stats", "[on|off]", "figures of the last answer, or behind each", stats},
    {"/read", "FILE [TEXT]", "send a file, and TEXT behind it", read_file},
    {"/save", "FILE", "write the conversation, one message a line of JSON", save},
    {"/load", "FILE", "read one back", load},
    {"/bye", "", "leave (also: exit, /exit, /quit, Ctrl-D)", quit},
    {"/exit", "", NULL, quit},
    {"/quit", "", NULL, quit},
};
#define N_COMMANDS (sizeof commands / sizeof *commands)

const char *const chat_command_names[] = {"/help", "/clear", "/regen", "/undo", "/edit", "/system",
                                          "/set",  "/show",  "/stats", "/read", "/save", "/load",
                                          "/bye",  "/exit",  "/quit",  NULL};

static err_code help(chat_app *a, const char *arg, err *e)
{
    (void)a;
    (void)arg;
    (void)e;
    for (size_t i = 0; i < N_COMMANDS; i++) {
        if (commands[i].help)
            (void)fprintf(stderr, "  %-8s %-12s %s\n", commands[i].name, commands[i].arg,
                          commands[i].help);
    }
    (void)fputs(
        "\"\"\" opens and closes a text of several lines; a \\ at the end of a line continues it\n"
        "Ctrl-C stops an answer; twice at the prompt leaves\n",
        stderr);
    return OK;
}

err_code chat_command_run(chat_app *a, const char *line, err *e)
{
    const size_t len = strcspn(line, " \n");
    const char *arg = line + len + strspn(line + len, " ");
    if (strcmp(line, "exit") == 0) return quit(a, "", e);
    if (strcmp(line, "end") == 0) return clear(a, "", e);
    for (size_t i = 0; i < N_COMMANDS; i++) {
        if (strlen(commands[i].name) == len && strncmp(commands[i].name, line, len) == 0)
            return commands[i].run(a, arg, e);
    }
    chat_app_note(a, "unknown command '%.*s'; /help lists them", (int)len, line);
    return OK;
}
