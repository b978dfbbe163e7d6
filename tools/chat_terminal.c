/* The line editor is libedit. It is given its bytes through a function of ours, for two reasons: it
 * would read on after Ctrl-C, and it does not know bracketed paste. */
#include "tools/chat_terminal.h"

#include <errno.h>
#include <histedit.h>
#include <langinfo.h>
#include <limits.h>
#include <locale.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <wchar.h>

#include "base/file.h"
#include "base/mem.h"

#define HISTORY_LINES 1000
#define MESSAGE_BYTES ((size_t)4 << 20)
#define ESCAPE_MS     50 /* the rest of an escape sequence comes at once, a typed Esc does not */
#define STOP_MS       50 /* how soon a signal is noticed at the latest */
/* Line ends inside a paste reach the editor as this visible sign and become line ends again
 * afterwards. */
#define PASTED_NEWLINE ((wchar_t)0x2424)
#define PASTED_UTF8    "\xe2\x90\xa4"

struct chat_terminal {
    EditLine *el;
    History *history;
    chat_terminal_opts o;
    char path[PATH_MAX]; /* of the history; "" none */
    char *text;          /* [MESSAGE_BYTES + 1] */
    size_t n;
    bool more; /* the prompt shows that a message goes on */
    bool in_paste, interrupted;
    unsigned char queue[16]; /* bytes read ahead */
    int queued;
};

/* ---- bytes ---- */

/* False when a signal asked to stop. It may come before the wait begins, or to another thread, and
 * wakes nobody then: so the flag is looked at, not the call's result. */
static bool wait_byte(chat_terminal *t)
{
    struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};
    do {
        if (t->o.stop && atomic_load(t->o.stop)) {
            t->interrupted = true;
            errno = EINTR;
            return false;
        }
    } while (poll(&p, 1, STOP_MS) <= 0);
    return true;
}

/* One byte; 0 at the end of input, -1 on Ctrl-C. */
static int next_byte(chat_terminal *t, unsigned char *c)
{
    if (t->queued) {
        *c = t->queue[0];
        memmove(t->queue, t->queue + 1, (size_t)--t->queued);
        return 1;
    }
    if (!wait_byte(t)) return -1;
    const ssize_t n = read(STDIN_FILENO, c, 1);
    if (n < 0 && errno == EINTR) t->interrupted = true;
    return n > 0 ? 1 : n == 0 ? 0 : -1;
}

/* Behind an ESC: swallows the mark of a paste's begin or end. Other bytes stay queued. */
static bool take_paste_mark(chat_terminal *t)
{
    static const char begin[] = "[200~", end[] = "[201~";
    while (t->queued < 5) {
        struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};
        if (memcmp(t->queue, begin, (size_t)t->queued) != 0 &&
            memcmp(t->queue, end, (size_t)t->queued) != 0)
            return false;
        if (poll(&p, 1, ESCAPE_MS) != 1 || read(STDIN_FILENO, &t->queue[t->queued], 1) != 1)
            return false;
        t->queued++;
    }
    const bool b = memcmp(t->queue, begin, 5) == 0, e = memcmp(t->queue, end, 5) == 0;
    if (!b && !e) return false;
    t->in_paste = b;
    t->queued -= 5;
    memmove(t->queue, t->queue + 5, (size_t)t->queued);
    return true;
}

static int utf8_tail(unsigned char c) { return c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : c >= 0xc0 ? 1 : 0; }

/* libedit's input function: one character, 0 at the end, -1 on error. */
static int get_char(EditLine *el, wchar_t *out)
{
    chat_terminal *t;
    unsigned char c, more;
    (void)el_get(el, EL_CLIENTDATA, &t);
    for (;;) {
        const int got = next_byte(t, &c);
        if (got != 1) return got;
        if (c == 0x1b && take_paste_mark(t)) continue;
        break;
    }
    if (t->in_paste && (c == '\n' || c == '\r')) { /* terminals send CR; libedit turns LF into CR */
        *out = PASTED_NEWLINE;
        return 1;
    }
    const int tail = utf8_tail(c);
    wchar_t w = tail == 3 ? c & 0x07 : tail == 2 ? c & 0x0f : tail == 1 ? c & 0x1f : c;
    for (int i = 0; i < tail; i++) {
        if (next_byte(t, &more) != 1) return -1;
        w = (wchar_t)((unsigned)w << 6 | (more & 0x3fu));
    }
    *out = w;
    return 1;
}

/* ---- completion ---- */

static size_t common(const char *a, const char *b)
{
    size_t n = 0;
    while (a[n] && a[n] == b[n]) n++;
    return n;
}

/* Completes `word` (n bytes) from names: inserts what all matches share. */
static bool complete_from(EditLine *el, const char *word, size_t n, const char *const *names,
                          size_t count)
{
    char insert[NAME_MAX + 2] = "";
    size_t len = 0;
    int matches = 0;
    for (size_t i = 0; i < count; i++) {
        if (strncmp(names[i], word, n) != 0) continue;
        if (matches++ == 0)
            len = (size_t)snprintf(insert, sizeof insert, "%s", names[i] + n);
        else
            len = common(insert, names[i] + n);
        if (len >= sizeof insert) len = sizeof insert - 1;
        insert[len] = 0;
    }
    if (matches == 0 || (len == 0 && matches > 1)) return false;
    return len == 0 || el_insertstr(el, insert) == 0;
}

static bool complete_path(EditLine *el, const char *word)
{
    char dir[PATH_MAX];
    const char *slash = strrchr(word, '/'), *base = slash ? slash + 1 : word;
    dir_list list;
    err ignored;
    (void)snprintf(dir, sizeof dir, "%.*s", slash ? (int)(slash - word + 1) : 1,
                   slash ? word : ".");
    if (dir_list_open(&list, dir, &ignored) != OK) return false;
    const bool done = complete_from(el, base, strlen(base), (const char *const *)list.names,
                                    list.n);
    dir_list_free(&list);
    return done;
}

static unsigned char complete(EditLine *el, int ch)
{
    chat_terminal *t;
    char word[PATH_MAX];
    const LineInfo *l = el_line(el);
    const char *begin = l->cursor;
    size_t count = 0;
    (void)ch;
    (void)el_get(el, EL_CLIENTDATA, &t);
    while (begin > l->buffer && begin[-1] != ' ') begin--;
    const size_t n = (size_t)(l->cursor - begin);
    if (n >= sizeof word || *l->buffer != '/') return CC_ERROR;
    memcpy(word, begin, n);
    word[n] = 0;
    while (t->o.commands[count]) count++;
    const bool done = begin == l->buffer ? complete_from(el, word, n, t->o.commands, count)
                                         : complete_path(el, word);
    return done ? CC_REFRESH : CC_ERROR;
}

/* ---- history ---- */

static err_code history_path(chat_terminal *t, err *e)
{
    char dir[PATH_MAX];
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    int n;
    if (state && *state == '/')
        n = snprintf(dir, sizeof dir, "%s/tmforge", state);
    else if (home && *home == '/')
        n = snprintf(dir, sizeof dir, "%s/.local/state/tmforge", home);
    else
        return OK; /* nowhere to keep it */
    if (n < 0 || (size_t)n >= sizeof dir) return OK;
    TRY(dir_make(dir, e));
    return path_join(t->path, sizeof t->path, dir, "chat_history", e);
}

static void history_load(chat_terminal *t)
{
    HistEvent ev;
    err ignored;
    if (!t->o.history || history_path(t, &ignored) != OK) t->path[0] = 0;
    if (t->path[0]) (void)history(t->history, &ev, H_LOAD, t->path);
}

static void history_save(chat_terminal *t)
{
    HistEvent ev;
    char fresh[PATH_MAX + 8];
    if (!t->path[0]) return;
    (void)snprintf(fresh, sizeof fresh, "%s.new", t->path);
    const mode_t old = umask(077);
    if (history(t->history, &ev, H_SAVE, fresh) >= 0 && chmod(fresh, 0600) == 0)
        (void)rename(fresh, t->path);
    else
        (void)unlink(fresh);
    (void)umask(old);
}

/* ---- opening ---- */

static char *prompt(EditLine *el)
{
    static char first[] = "> ", more[] = "... ";
    chat_terminal *t;
    (void)el_get(el, EL_CLIENTDATA, &t);
    return t->more ? more : first;
}

/* Characters need a UTF-8 locale; numbers keep the C one. */
static void use_utf8(void)
{
    if (!setlocale(LC_CTYPE, "") || strcmp(nl_langinfo(CODESET), "UTF-8") != 0)
        (void)setlocale(LC_CTYPE, "C.UTF-8");
}

static err_code editor_open(chat_terminal *t, err *e)
{
    HistEvent ev;
    use_utf8();
    t->history = history_init();
    t->el = el_init("tm-run", stdin, stdout, stderr);
    if (!t->history || !t->el)
        return err_set(e, E_IO, "cannot open the line editor on this terminal");
    (void)history(t->history, &ev, H_SETSIZE, HISTORY_LINES);
    (void)history(t->history, &ev, H_SETUNIQUE, 1);
    (void)el_set(t->el, EL_CLIENTDATA, t);
    (void)el_set(t->el, EL_EDITOR, "emacs");
    (void)el_set(t->el, EL_SIGNAL, 0);
    (void)el_set(t->el, EL_GETCFN, get_char);
    (void)el_set(t->el, EL_PROMPT, prompt);
    (void)el_set(t->el, EL_HIST, history, t->history);
    /* The narrow form of this call would leak copies of the two strings. */
    (void)el_wset(t->el, EL_ADDFN, L"tmf-complete", L"completes commands and paths", complete);
    (void)el_set(t->el, EL_BIND, "^I", "tmf-complete", NULL);
    (void)el_source(t->el, NULL); /* the user's .editrc */
    history_load(t);
    return OK;
}

err_code chat_terminal_open(chat_terminal **out, const chat_terminal_opts *o, err *e)
{
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(chat_terminal), "terminal", e));
    chat_terminal *t = p;
    t->o = *o;
    err_code rc = mem_alloc(&p, MESSAGE_BYTES + 1, 1, "message", e);
    t->text = p;
    if (rc == OK) rc = editor_open(t, e);
    if (rc != OK) {
        t->path[0] = 0;
        chat_terminal_close(&t);
    }
    *out = t;
    return rc;
}

void chat_terminal_close(chat_terminal **t)
{
    if (!t || !*t) return;
    if ((*t)->history) history_save(*t);
    if ((*t)->el) el_end((*t)->el);
    if ((*t)->history) history_end((*t)->history);
    mem_free((*t)->text);
    mem_free(*t);
    *t = NULL;
}

void chat_terminal_prefill(chat_terminal *t, const char *text)
{
    /* The editor takes pushed text as typed: a line end would send it. */
    char *line;
    size_t n = 0;
    err ignored;
    if (mem_alloc((void **)&line, 3 * strlen(text) + 1, 1, "line", &ignored) != OK) return;
    for (const char *p = text; *p; p++) {
        if (*p == '\n') {
            memcpy(line + n, PASTED_UTF8, 3);
            n += 3;
        } else {
            line[n++] = *p;
        }
    }
    el_push(t->el, line);
    mem_free(line);
}

/* ---- reading ---- */

static void paste_mode(bool on)
{
    const char *term = getenv("TERM");
    if (!isatty(STDOUT_FILENO) || !term || strcmp(term, "dumb") == 0) return;
    (void)fputs(on ? "\x1b[?2004h" : "\x1b[?2004l", stdout);
    (void)fflush(stdout);
}

static err_code append(chat_terminal *t, const char *s, size_t n, err *e)
{
    if (n > MESSAGE_BYTES - t->n)
        return err_set(e, E_LIMIT, "message: more than %zu bytes", MESSAGE_BYTES);
    memcpy(t->text + t->n, s, n);
    t->n += n;
    t->text[t->n] = 0;
    return OK;
}

/* Appends a line with the signs of pasted line ends turned back. */
static err_code append_line(chat_terminal *t, const char *s, size_t n, err *e)
{
    const char *end = s + n;
    for (const char *p; (p = memmem(s, (size_t)(end - s), PASTED_UTF8, 3)); s = p + 3) {
        TRY(append(t, s, (size_t)(p - s), e));
        TRY(append(t, "\n", 1, e));
    }
    return append(t, s, (size_t)(end - s), e);
}

/* How a message goes on behind the line that was just added. */
typedef struct {
    bool block; /* inside three quotes */
    bool done;
} message_state;

static err_code add_line(chat_terminal *t, message_state *s, const char *line, size_t n, err *e)
{
    const bool first = t->n == 0 && !s->block;
    if (first && n >= 3 && memcmp(line, "\"\"\"", 3) == 0) {
        s->block = true;
        line += 3;
        n -= 3;
    }
    if (s->block) {
        if (n >= 3 && memcmp(line + n - 3, "\"\"\"", 3) == 0) {
            s->done = true;
            return append_line(t, line, n - 3, e);
        }
        TRY(append_line(t, line, n, e));
        return append(t, "\n", 1, e);
    }
    if (t->o.double_enter) {
        s->done = n == 0 || (first && line[0] == '/');
        TRY(append_line(t, line, n, e));
        return n ? append(t, "\n", 1, e) : OK;
    }
    if (n && line[n - 1] == '\\') {
        TRY(append_line(t, line, n - 1, e));
        return append(t, "\n", 1, e);
    }
    s->done = true;
    return append_line(t, line, n, e);
}

static void remember(chat_terminal *t)
{
    HistEvent ev;
    /* One line an entry: the history is a file of lines, and blocks are not worth recalling. */
    if (t->n == 0) return;
    for (size_t i = 0; i < t->n; i++) {
        if (t->text[i] == '\n') return;
    }
    (void)history(t->history, &ev, H_ENTER, t->text);
}

err_code chat_terminal_read(chat_terminal *t, char **text, chat_input *what, err *e)
{
    message_state s = {0};
    err_code rc = OK;
    t->n = 0;
    t->text[0] = 0;
    t->in_paste = t->interrupted = t->more = false;
    *what = CHAT_MESSAGE;
    paste_mode(true);
    while (rc == OK && !s.done) {
        int count = 0;
        errno = 0;
        const char *line = el_gets(t->el, &count);
        if (!line || count <= 0) {
            *what = t->interrupted || errno == EINTR ? CHAT_INTERRUPT : CHAT_END;
            break;
        }
        size_t n = (size_t)count;
        while (n && (line[n - 1] == '\n' || line[n - 1] == '\r')) n--;
        rc = add_line(t, &s, line, n, e);
        t->more = true;
    }
    paste_mode(false);
    if (*what == CHAT_INTERRUPT) el_reset(t->el);
    while (t->n && t->text[t->n - 1] == '\n') t->text[--t->n] = 0;
    if (rc == OK && *what == CHAT_MESSAGE) remember(t);
    *text = t->text;
    return rc;
}
