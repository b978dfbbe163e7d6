/* Prompts are made when their request goes out: nothing but the pool of ids or rows is kept. */
#include "tools/load_prompts.h"

#include <string.h>

#include "base/file.h"
#include "base/mem.h"

#define FILE_MAX   ((size_t)256 << 20)
#define ROWS_MAX   (1 << 20)
#define POOL_WORDS 2048 /* given to the server's tokenizer */

/* Common short words: one token each in most vocabularies. */
static const char *const words[] = {
    "the",  "of",   "and",  "to",   "in",   "is",    "that",  "it",    "was",  "for",  "on",
    "are",  "with", "as",   "his",  "they", "be",    "at",    "one",   "have", "this", "from",
    "or",   "had",  "by",   "hot",  "but",  "some",  "what",  "there", "we",   "can",  "out",
    "were", "all",  "your", "when", "up",   "use",   "word",  "how",   "said", "an",   "each",
    "she",  "do",   "time", "if",   "will", "way",   "about", "many",  "then", "them", "would",
    "like", "so",   "her",  "long", "make", "thing", "see",   "him",   "two"};
#define N_WORDS (sizeof words / sizeof *words)

struct load_prompts {
    load_prompts_opts o;
    char *text;    /* of the file; rows point into it */
    char **rows;   /* [n_rows], NUL-terminated */
    cJSON **json;  /* [n_rows] where the file is .jsonl */
    int32_t *pool; /* [n_pool] ids of words; NULL: words go out as text */
    int64_t n_rows, n_pool;
};

uint64_t load_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

double load_uniform(uint64_t *state) { return (double)((load_random(state) >> 11) + 1) * 0x1p-53; }

/* ---- files ---- */

static err_code parse_row(load_prompts *p, int64_t i, size_t n, err *e)
{
    cJSON **o = &p->json[i];
    TRY(json_parse(o, p->rows[i], n, "row", e));
    const cJSON *prompt = cJSON_GetObjectItemCaseSensitive(*o, "prompt");
    const cJSON *messages = cJSON_GetObjectItemCaseSensitive(*o, "messages");
    if (cJSON_IsString(prompt) || cJSON_IsArray(prompt) || cJSON_IsArray(messages)) return OK;
    return err_set(e, E_INPUT, "expected \"prompt\" or \"messages\"");
}

static err_code read_rows(load_prompts *p, bool jsonl, err *e)
{
    int64_t cap = 1, line = 0;
    void *rows, *json = NULL;
    for (const char *s = p->text; *s; s++) cap += *s == '\n';
    if (cap > ROWS_MAX) return err_set(e, E_LIMIT, "more than %d lines", ROWS_MAX);
    TRY(mem_alloc(&rows, (size_t)cap, sizeof(char *), "prompts", e));
    p->rows = rows;
    if (jsonl) TRY(mem_alloc(&json, (size_t)cap, sizeof(cJSON *), "prompts", e));
    p->json = json;
    for (char *s = p->text, *next; s; s = next) {
        next = strchr(s, '\n');
        if (next) *next++ = 0;
        line++;
        s[strcspn(s, "\r")] = 0;
        if (!s[strspn(s, " \t")]) continue;
        p->rows[p->n_rows++] = s;
        if (jsonl && parse_row(p, p->n_rows - 1, strlen(s), e) != OK)
            return err_wrap(e, "line %lld", (long long)line);
    }
    return p->n_rows ? OK : err_set(e, E_INPUT, "no prompts");
}

/* ---- made up ---- */

static err_code words_text(char **out, int64_t n, uint64_t *state, err *e)
{
    void *p;
    size_t at = 0;
    TRY(mem_alloc(&p, (size_t)n, 8, "prompt", e)); /* no word has more than six letters */
    *out = p;
    for (int64_t i = 0; i < n; i++) {
        const char *w = words[load_random(state) % N_WORDS];
        const size_t len = strlen(w);
        if (i) (*out)[at++] = ' ';
        memcpy(*out + at, w, len + 1);
        at += len;
    }
    return OK;
}

static err_code keep_pool(load_prompts *p, const cJSON *ids, err *e)
{
    void *pool;
    const int n = cJSON_GetArraySize(ids);
    TRY(mem_alloc(&pool, (size_t)n, sizeof(int32_t), "prompt ids", e));
    p->pool = pool;
    for (const cJSON *id = ids->child; id; id = id->next) {
        if (cJSON_IsNumber(id)) p->pool[p->n_pool++] = id->valueint;
    }
    return OK;
}

/* Ids of words by the server's tokenizer; one without it (or that tells no ids) gets words. */
static err_code ask_pool(load_prompts *p, http_client *h, const job *j, err *e)
{
    char *text, *body = NULL;
    uint64_t state = p->o.seed;
    cJSON *answer = NULL;
    err why;
    TRY(words_text(&text, POOL_WORDS, &state, e));
    cJSON *o = cJSON_CreateObject();
    const bool ok = o && cJSON_AddStringToObject(o, "content", text) &&
                    cJSON_AddFalseToObject(o, "add_special");
    err_code rc = ok ? json_print(&body, o, false, e)
                     : err_set(e, E_NOMEM, "prompts: out of memory");
    if (rc == OK && http_client_json(h, "/tokenize", body, j, &answer, &why) == OK) {
        const cJSON *ids = cJSON_GetObjectItemCaseSensitive(answer, "tokens");
        if (cJSON_IsArray(ids) && cJSON_IsNumber(ids->child)) rc = keep_pool(p, ids, e);
    }
    if (rc == OK) rc = job_check(j, e);
    cJSON_Delete(answer);
    cJSON_Delete(o);
    mem_free(body);
    mem_free(text);
    return rc;
}

err_code load_prompts_open(load_prompts **out, const load_prompts_opts *o, http_client *h,
                           const job *j, err *e)
{
    void *p;
    size_t n;
    TRY(mem_alloc(&p, 1, sizeof(load_prompts), "prompts", e));
    *out = p;
    (*out)->o = *o;
    if (o->file) {
        const size_t len = strlen(o->file);
        const bool jsonl = len > 6 && strcmp(o->file + len - 6, ".jsonl") == 0;
        TRY(file_read(&(*out)->text, &n, o->file, FILE_MAX, e));
        if (read_rows(*out, jsonl, e) != OK) return err_wrap(e, "'%s'", o->file);
        return OK;
    }
    return o->chat ? OK : ask_pool(*out, h, j, e);
}

void load_prompts_close(load_prompts **out)
{
    load_prompts *p = *out;
    if (!p) return;
    for (int64_t i = 0; p->json && i < p->n_rows; i++) cJSON_Delete(p->json[i]);
    mem_free(p->json);
    mem_free(p->rows);
    mem_free(p->text);
    mem_free(p->pool);
    mem_free(p);
    *out = NULL;
}

bool load_prompts_exact(const load_prompts *p) { return p->pool != NULL; }

/* ---- bodies ---- */

static bool add_message(cJSON *o, const char *text)
{
    cJSON *list = cJSON_AddArrayToObject(o, "messages"), *m = cJSON_CreateObject();
    if (list && m && cJSON_AddItemToArray(list, m))
        return cJSON_AddStringToObject(m, "role", "user") &&
               cJSON_AddStringToObject(m, "content", text);
    cJSON_Delete(m);
    return false;
}

static bool add_ids(cJSON *o, const load_prompts *p, uint64_t *state)
{
    cJSON *list = cJSON_AddArrayToObject(o, "prompt");
    bool ok = list != NULL;
    for (int64_t i = 0; ok && i < p->o.prompt_tokens; i++) {
        const int32_t id = p->pool[load_random(state) % (uint64_t)p->n_pool];
        cJSON *v = cJSON_CreateNumber(id);
        ok = v && cJSON_AddItemToArray(list, v);
    }
    return ok;
}

static bool add_copy(cJSON *o, const char *key, const cJSON *from)
{
    cJSON *v = cJSON_Duplicate(from, true);
    if (v && cJSON_AddItemToObject(o, key, v)) return true;
    cJSON_Delete(v);
    return false;
}

/* The prompt of a request; *chat: it goes to the chat route. */
static bool add_prompt(cJSON *o, const load_prompts *p, int64_t i, bool *chat)
{
    uint64_t state = p->o.seed + 0x632be59bd9b4e019u * (uint64_t)(p->o.shared ? 1 : i + 1);
    err ignored;
    char *text;
    *chat = p->o.chat;
    if (p->json) {
        const cJSON *row = p->json[i % p->n_rows];
        const cJSON *messages = cJSON_GetObjectItemCaseSensitive(row, "messages");
        const cJSON *prompt = cJSON_GetObjectItemCaseSensitive(row, "prompt");
        if (messages) *chat = true;
        if (messages) return add_copy(o, "messages", messages);
        if (p->o.chat && cJSON_IsString(prompt)) return add_message(o, prompt->valuestring);
        *chat = false;
        return add_copy(o, "prompt", prompt);
    }
    if (p->pool) return add_ids(o, p, &state);
    if (p->rows) {
        text = p->rows[i % p->n_rows];
        return *chat ? add_message(o, text) : cJSON_AddStringToObject(o, "prompt", text) != NULL;
    }
    if (words_text(&text, p->o.prompt_tokens, &state, &ignored) != OK) return false;
    const bool ok = *chat ? add_message(o, text)
                          : cJSON_AddStringToObject(o, "prompt", text) != NULL;
    mem_free(text);
    return ok;
}

err_code load_prompts_body(load_prompts *p, int64_t i, char **body, const char **path, err *e)
{
    bool chat = false;
    cJSON *o = cJSON_CreateObject(), *so = NULL;
    const bool ok = o && cJSON_AddStringToObject(o, "model", p->o.model) &&
                    add_prompt(o, p, i, &chat) &&
                    cJSON_AddNumberToObject(o, "max_tokens", (double)p->o.new_tokens) &&
                    cJSON_AddNumberToObject(o, "temperature", p->o.temperature) &&
                    (p->o.temperature <= 0 ||
                     cJSON_AddNumberToObject(o, "seed", (double)(i + 1))) &&
                    (p->o.at_eos || cJSON_AddTrueToObject(o, "ignore_eos")) &&
                    cJSON_AddTrueToObject(o, "stream") &&
                    (so = cJSON_AddObjectToObject(o, "stream_options")) &&
                    cJSON_AddTrueToObject(so, "include_usage");
    const err_code rc = ok ? json_print(body, o, false, e)
                           : err_set(e, E_NOMEM, "request: out of memory");
    cJSON_Delete(o);
    *path = chat ? "/v1/chat/completions" : "/v1/completions";
    return rc;
}
