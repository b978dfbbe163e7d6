/* Tasks: a small continuous batch. Free slots take the next prompt, busy ones decode, all in one
 * step. */
#include "runtime/tasks.h"

#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"

#define TASKS_MAX_BYTES ((size_t)256 << 20)
#define TASKS_MAX_LINES 1000000

typedef struct {
    int32_t line, kind;
    int64_t begin, n; /* ids in tasks.ids */
    char *answer;
} task;

struct tasks {
    const tokenizer *t;
    const chat *c;
    const char *meta;
    task *task; /* [n], room for cap */
    int32_t n, cap;
    int32_t longest;
    char *kind[TASKS_MAX_KINDS];
    int n_kinds;
    token_list ids; /* of all prompts, one behind another */
};

/* ---- reading ---- */

static err_code kind_of(tasks *k, const char *name, int32_t *out, err *e)
{
    for (int i = 0; i < k->n_kinds; i++) {
        if (strcmp(k->kind[i], name) == 0) {
            *out = i;
            return OK;
        }
    }
    if (k->n_kinds == TASKS_MAX_KINDS)
        return err_set(e, E_INPUT, "kind '%.40s': expected at most %d kinds", name,
                       TASKS_MAX_KINDS);
    TRY(mem_strdup(&k->kind[k->n_kinds], name, e));
    *out = k->n_kinds++;
    return OK;
}

static err_code grow(tasks *k, err *e)
{
    void *p;
    const int32_t cap = k->cap ? 2 * k->cap : 256;
    if (k->n < k->cap) return OK;
    if (k->n >= TASKS_MAX_LINES) return err_set(e, E_LIMIT, "more than %d tasks", TASKS_MAX_LINES);
    TRY(mem_alloc(&p, (size_t)cap, sizeof(task), "tasks", e));
    if (k->n) memcpy(p, k->task, (size_t)k->n * sizeof(task));
    mem_free(k->task);
    k->task = p;
    k->cap = cap;
    return OK;
}

/* Roles and contents of a row's messages; m has room for n. */
static err_code read_messages(chat_message *m, const cJSON *list, err *e)
{
    const cJSON *x;
    int i = 0;
    cJSON_ArrayForEach(x, list)
    {
        TRY(json_get_str(x, "role", &m[i].role, e));
        TRY(json_get_str(x, "content", &m[i].content, e));
        i++;
    }
    return OK;
}

static err_code add_prompt(tasks *k, task *t, const cJSON *o, err *e)
{
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(o, "messages");
    const int n = cJSON_GetArraySize(list);
    void *m;
    if (!cJSON_IsArray(list) || n == 0)
        return err_set(e, E_INPUT, "messages: expected a list of objects");
    TRY(mem_alloc(&m, (size_t)n, sizeof(chat_message), "messages", e));
    err_code rc = read_messages(m, list, e);
    t->begin = k->ids.n;
    if (rc == OK) rc = chat_encode(k->c, m, n, k->meta, true, &k->ids, e);
    mem_free(m);
    t->n = k->ids.n - t->begin;
    if (rc == OK && t->n > k->longest) k->longest = (int32_t)t->n;
    return rc;
}

static err_code add_row(tasks *k, const cJSON *o, int32_t line, err *e)
{
    const char *kind, *answer;
    TRY(grow(k, e));
    task *t = &k->task[k->n];
    *t = (task){.line = line};
    TRY(json_get_str(o, "kind", &kind, e));
    TRY(json_get_str(o, "answer", &answer, e));
    TRY(kind_of(k, kind, &t->kind, e));
    TRY(add_prompt(k, t, o, e));
    TRY(mem_strdup(&t->answer, answer, e));
    k->n++;
    return OK;
}

static err_code add_lines(tasks *k, const char *text, size_t n, const char *path, err *e)
{
    int32_t line = 0;
    for (size_t at = 0; at < n;) {
        const char *end = memchr(text + at, '\n', n - at);
        const size_t len = end ? (size_t)(end - text) - at : n - at;
        cJSON *o = NULL;
        line++;
        if (strspn(text + at, " \t\r\n") < len) {
            err_code rc = json_parse(&o, text + at, len, "task", e);
            if (rc == OK) rc = add_row(k, o, line, e);
            cJSON_Delete(o);
            if (rc != OK) return err_wrap(e, "'%s': line %d", path, line);
        }
        at += len + 1;
    }
    return k->n ? OK : err_set(e, E_INPUT, "'%s': no tasks", path);
}

err_code tasks_open(tasks **out, const char *path, const tokenizer *t, const chat *c,
                    const char *meta_instruction, err *e)
{
    void *p;
    char *text = NULL;
    size_t n;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(tasks), "tasks", e));
    tasks *k = p;
    k->t = t;
    k->c = c;
    k->meta = meta_instruction;
    err_code rc = file_read(&text, &n, path, TASKS_MAX_BYTES, e);
    if (rc == OK) rc = add_lines(k, text, n, path, e);
    mem_free(text);
    if (rc != OK) tasks_close(&k);
    *out = k;
    return rc;
}

void tasks_close(tasks **k)
{
    if (!k || !*k) return;
    for (int32_t i = 0; i < (*k)->n; i++) mem_free((*k)->task[i].answer);
    for (int i = 0; i < (*k)->n_kinds; i++) mem_free((*k)->kind[i]);
    mem_free((*k)->task);
    token_list_free(&(*k)->ids);
    mem_free(*k);
    *k = NULL;
}

int32_t tasks_count(const tasks *k) { return k->n; }
int32_t tasks_longest(const tasks *k) { return k->longest; }

/* ---- answering ---- */

typedef struct {
    int32_t task; /* -1: free */
    int32_t n;    /* ids of the reply so far */
    int32_t last, next;
} lane;

typedef struct {
    const tasks *k;
    const tasks_opts *o;
    model *m;
    int32_t lanes, started, done;
    lane *lane;     /* [lanes] */
    step_seq *seqs; /* [lanes] */
    int32_t *which; /* [lanes] lane of each sequence of the step */
    int32_t *reply; /* [lanes, max_new] */
    tasks_result *r;
} batch;

static bool is_stop(const tasks_opts *o, int32_t id)
{
    for (int i = 0; i < o->n_stop_ids; i++) {
        if (o->stop_ids[i] == id) return true;
    }
    return false;
}

/* A reply is complete: its text without the stop id against the answer. */
static err_code judge(batch *b, int32_t at, bool stopped, err *e)
{
    lane *l = &b->lane[at];
    const task *t = &b->k->task[l->task];
    char *text;
    size_t n;
    TRY(tokenizer_decode(b->k->t, b->reply + (size_t)at * (size_t)b->o->max_new,
                         l->n - (stopped ? 1 : 0), true, &text, &n, e));
    const bool right = stopped && strcmp(text, t->answer) == 0;
    b->r->kind[t->kind].right += right;
    b->r->right += right;
    if (!right && b->o->on_wrong)
        b->o->on_wrong(b->o->ud, t->line, b->k->kind[t->kind], t->answer, text);
    mem_free(text);
    model_seq_end(b->m, at);
    l->task = -1;
    b->done++;
    return OK;
}

/* The next step: a prompt for each free lane while there are some, one token for each busy one. */
static int fill(batch *b)
{
    int n = 0;
    for (int32_t i = 0; i < b->lanes; i++) {
        lane *l = &b->lane[i];
        step_seq *s = &b->seqs[n];
        *s = (step_seq){
            .slot = i, .tokens = &l->last, .n_tokens = 1, .n_out = 1, .argmax = &l->next};
        if (l->task < 0) {
            if (b->started == b->k->n) continue;
            *l = (lane){.task = b->started++};
            s->tokens = b->k->ids.ids + b->k->task[l->task].begin;
            s->n_tokens = (int32_t)b->k->task[l->task].n;
        }
        b->which[n++] = i;
    }
    return n;
}

static err_code take(batch *b, int n, err *e)
{
    for (int i = 0; i < n; i++) {
        lane *l = &b->lane[b->which[i]];
        l->last = l->next;
        b->reply[(size_t)b->which[i] * (size_t)b->o->max_new + (size_t)l->n++] = l->last;
        const bool stopped = is_stop(b->o, l->last);
        if (stopped || l->n == b->o->max_new) TRY(judge(b, b->which[i], stopped, e));
    }
    return OK;
}

static err_code batch_make(batch *b, err *e)
{
    const size_t n = (size_t)b->lanes;
    void *p;
    TRY(mem_alloc(&p, n, sizeof(lane), "tasks", e));
    b->lane = p;
    TRY(mem_alloc(&p, n, sizeof(step_seq), "tasks", e));
    b->seqs = p;
    TRY(mem_alloc(&p, n, sizeof(int32_t), "tasks", e));
    b->which = p;
    TRY(mem_alloc(&p, n, (size_t)b->o->max_new * sizeof(int32_t), "tasks", e));
    b->reply = p;
    for (int32_t i = 0; i < b->lanes; i++) b->lane[i].task = -1;
    return OK;
}

static void batch_free(batch *b)
{
    for (int32_t i = 0; i < b->lanes; i++) model_seq_end(b->m, i);
    mem_free(b->lane);
    mem_free(b->seqs);
    mem_free(b->which);
    mem_free(b->reply);
}

err_code tasks_run(tasks_result *r, const tasks *k, model *m, const tasks_opts *o, const job *j,
                   err *e)
{
    batch b = {.k = k, .o = o, .m = m, .lanes = model_plan_of(m)->max_seqs, .r = r};
    memset(r, 0, sizeof *r);
    if (o->max_new < 1)
        return err_set(e, E_USAGE, "tasks: new tokens: expected 1 or more, got %d", o->max_new);
    if (k->longest > model_session_len(m) - o->max_new)
        return err_set(
            e, E_LIMIT,
            "tasks: a prompt of %d tokens and a reply of %d do not fit the session of %d",
            k->longest, o->max_new, model_session_len(m));
    for (int i = 0; i < k->n_kinds; i++) r->kind[i].kind = k->kind[i];
    r->n_kinds = k->n_kinds;
    for (int32_t i = 0; i < k->n; i++) r->kind[k->task[i].kind].total++;
    r->total = k->n;
    err_code rc = batch_make(&b, e);
    while (rc == OK && b.done < k->n) {
        const int n = fill(&b);
        job_step(j, "tasks", "reply", b.done, k->n);
        rc = model_step(m, b.seqs, n, j, e);
        if (rc == OK) rc = take(&b, n, e);
    }
    if (rc == OK) job_step(j, "tasks", "reply", k->n, k->n);
    batch_free(&b);
    return rc;
}
