#include "runtime/serve/session.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "base/mem.h"

struct session {
    uint64_t owner;
    int64_t id;
    uint64_t used; /* when it was given back, in calls */
    token_list ids;
    int32_t last;
    chat_message *said; /* [n_said] role and content, one piece of memory each, role first */
    int64_t n_said, cap_said, said_bytes;
    bool lossy; /* something of what was said is not in it */
    bool here, held;
    atomic_bool cancel;
};

struct session_table {
    pthread_mutex_t lock;
    session *all; /* [max_sessions] */
    int32_t max_sessions;
    int64_t max_tokens;
    uint64_t calls;
};

err_code session_table_open(session_table **out, int32_t max_sessions, int64_t max_tokens, err *e)
{
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(session_table), "sessions", e));
    session_table *t = p;
    t->max_sessions = max_sessions;
    t->max_tokens = max_tokens;
    (void)pthread_mutex_init(&t->lock, NULL);
    const err_code rc = mem_alloc(&p, (size_t)max_sessions, sizeof(session), "sessions", e);
    t->all = p;
    if (rc != OK) session_table_close(&t);
    *out = t;
    return rc;
}

static void forget(session *s)
{
    token_list_free(&s->ids);
    memset(&s->ids, 0, sizeof s->ids);
    for (int64_t i = 0; i < s->n_said; i++) mem_free((char *)(uintptr_t)s->said[i].role);
    mem_free(s->said);
    s->said = NULL;
    s->n_said = s->cap_said = s->said_bytes = 0;
    s->lossy = s->here = false;
}

void session_table_close(session_table **t)
{
    if (!t || !*t) return;
    for (int32_t i = 0; (*t)->all && i < (*t)->max_sessions; i++) forget(&(*t)->all[i]);
    (void)pthread_mutex_destroy(&(*t)->lock);
    mem_free((*t)->all);
    mem_free(*t);
    *t = NULL;
}

static session *find(session_table *t, uint64_t owner, int64_t id)
{
    for (int32_t i = 0; i < t->max_sessions; i++) {
        session *s = &t->all[i];
        if (s->here && s->owner == owner && s->id == id) return s;
    }
    return NULL;
}

/* The one not held that was used longest ago; NULL: all are held. */
static session *oldest(session_table *t)
{
    session *found = NULL;
    for (int32_t i = 0; i < t->max_sessions; i++) {
        session *s = &t->all[i];
        if (s->here && !s->held && (!found || s->used < found->used)) found = s;
    }
    return found;
}

static session *place(session_table *t)
{
    for (int32_t i = 0; i < t->max_sessions; i++)
        if (!t->all[i].here) return &t->all[i];
    session *s = oldest(t);
    if (s) forget(s);
    return s;
}

err_code session_take(session **out, session_table *t, uint64_t owner, int64_t id, err *e)
{
    err_code rc = OK;
    (void)pthread_mutex_lock(&t->lock);
    session *s = find(t, owner, id);
    if (s && s->held) {
        rc = err_set(e, E_BUSY, "session %" PRId64 " is answering", id);
    } else if (!s && !(s = place(t))) {
        rc = err_set(e, E_BUSY, "all %d sessions are answering", t->max_sessions);
    } else {
        if (!s->here) {
            s->owner = owner;
            s->id = id;
            s->last = -1;
            s->here = true;
        }
        s->held = true;
        atomic_store(&s->cancel, false);
    }
    (void)pthread_mutex_unlock(&t->lock);
    *out = rc == OK ? s : NULL;
    return rc;
}

token_list *session_ids(session *s) { return &s->ids; }

int32_t *session_last(session *s) { return &s->last; }

static bool say(session *s, const chat_message *m)
{
    const size_t n_role = strlen(m->role) + 1, n = strlen(m->content) + 1;
    err ignored;
    void *p;
    if (s->n_said == s->cap_said) {
        const int64_t cap = 2 * s->cap_said + 8;
        if (mem_alloc(&p, (size_t)cap, sizeof *s->said, "session", &ignored) != OK) return false;
        if (s->n_said) memcpy(p, s->said, (size_t)s->n_said * sizeof *s->said);
        mem_free(s->said);
        s->said = p;
        s->cap_said = cap;
    }
    if (mem_alloc(&p, n_role + n, 1, "session", &ignored) != OK) return false;
    char *text = p;
    memcpy(text, m->role, n_role);
    memcpy(text + n_role, m->content, n);
    s->said[s->n_said++] = (chat_message){.role = text, .content = text + n_role};
    s->said_bytes += (int64_t)(n_role + n);
    return true;
}

void session_say(session *s, const chat_message *m)
{
    const bool plain = m->role && m->content && !m->name && !m->tool_call_id && !m->tool_calls &&
                       !m->reasoning;
    if (s->lossy || !plain || !say(s, m)) s->lossy = true;
}

const chat_message *session_said(const session *s, int64_t *n)
{
    *n = s->n_said;
    return s->lossy ? NULL : s->said;
}

bool session_canceled(const session *s) { return atomic_load(&s->cancel); }

static int64_t size_of(const session *s) { return s->ids.n + s->said_bytes / 4; }

/* Forgets the oldest until all together are short enough. */
static void shorten(session_table *t)
{
    int64_t n = 0;
    for (int32_t i = 0; i < t->max_sessions; i++)
        if (t->all[i].here && !t->all[i].held) n += size_of(&t->all[i]);
    for (session *s; n > t->max_tokens && (s = oldest(t));) {
        n -= size_of(s);
        forget(s);
    }
}

void session_give(session_table *t, session **s, bool keep)
{
    if (!*s) return;
    (void)pthread_mutex_lock(&t->lock);
    (*s)->held = false;
    (*s)->used = ++t->calls;
    if (keep)
        shorten(t);
    else
        forget(*s);
    (void)pthread_mutex_unlock(&t->lock);
    *s = NULL;
}

bool session_cancel(session_table *t, uint64_t owner, int64_t id)
{
    (void)pthread_mutex_lock(&t->lock);
    session *s = find(t, owner, id);
    const bool held = s && s->held;
    if (held) atomic_store(&s->cancel, true);
    (void)pthread_mutex_unlock(&t->lock);
    return held;
}
