/* Texts and ids: tokenizer and chat template. */
#include <string.h>
#include <time.h>

#include "base/mem.h"
#include "lib/tmf_internal.h"
#include "runtime/serve/api.h"

/* ---- results into the caller's memory ---- */

static tmf_status give_ids(const err *failed, err_code rc, token_list *l, int32_t *ids, size_t cap,
                           size_t *n, tmf_error *e)
{
    *n = rc == OK ? (size_t)l->n : 0;
    if (*n && cap) memcpy(ids, l->ids, (*n < cap ? *n : cap) * sizeof *ids);
    token_list_free(l);
    return rc == OK ? TMF_OK : tmf_told(failed, e);
}

static tmf_status give_text(const err *failed, err_code rc, char *from, size_t len, char *text,
                            size_t cap, size_t *n, tmf_error *e)
{
    *n = rc == OK ? len : 0;
    if (rc == OK && cap) {
        const size_t part = len < cap ? len : cap - 1;
        memcpy(text, from, part);
        text[part] = 0;
    }
    mem_free(from);
    return rc == OK ? TMF_OK : tmf_told(failed, e);
}

/* ---- plain texts ---- */

tmf_status tmf_encode(const tmf_model *m, const char *text, size_t bytes, int flags, int32_t *ids,
                      size_t cap, size_t *n, tmf_error *e)
{
    token_list l = {0};
    err failed;
    err_code rc = OK;
    if (flags & TMF_ADD_BOS && tokenizer_add_bos(m->t) && tokenizer_bos(m->t) >= 0)
        rc = token_list_push(&l, tokenizer_bos(m->t), &failed);
    if (rc == OK) rc = tokenizer_encode(m->t, text, bytes, flags & TMF_PARSE_SPECIAL, &l, &failed);
    return give_ids(&failed, rc, &l, ids, cap, n, e);
}

tmf_status tmf_decode(const tmf_model *m, const int32_t *ids, size_t n_ids, int flags, char *text,
                      size_t cap, size_t *n, tmf_error *e)
{
    char *all = NULL;
    size_t len = 0;
    err failed;
    const err_code rc = tokenizer_decode(m->t, ids, (int64_t)n_ids, !(flags & TMF_KEEP_SPECIAL),
                                         &all, &len, &failed);
    return give_text(&failed, rc, all, len, text, cap, n, e);
}

/* ---- conversations: read as the server reads them ---- */

/* A bare list is taken as "messages". */
static err_code parse(api_request *q, const tmf_model *m, const char *text, size_t bytes, err *e)
{
    static const char head[] = "{\"messages\":";
    const api_limits limits = {.vocab = model_desc_of(m->m)->vocab, .max_n = 1};
    const size_t n_head = sizeof head - 1;
    size_t blank = 0, all;
    api_fault fault;
    void *p = NULL;
    while (blank < bytes && strchr(" \t\r\n", text[blank]) && text[blank]) blank++;
    if (blank < bytes && text[blank] == '[') {
        TRY(mem_add(&all, bytes, n_head + 1, "messages", e));
        TRY(mem_alloc(&p, all, 1, "messages", e));
        memcpy(p, head, n_head);
        memcpy((char *)p + n_head, text, bytes);
        ((char *)p)[all - 1] = '}';
        text = p;
        bytes = all;
    }
    const err_code rc = api_parse(q, API_TEMPLATE, text, bytes, &limits, &fault);
    mem_free(p);
    return rc == OK ? OK : err_set(e, E_INPUT, "%s", fault.message);
}

static chat_request request_of(const api_request *q, int flags)
{
    return (chat_request){.messages = q->messages,
                          .n = q->n_messages,
                          .tools = q->tools,
                          .kwargs = q->kwargs,
                          .now = (int64_t)time(NULL),
                          .add_generation = q->add_generation && !(flags & TMF_NO_GENERATION)};
}

tmf_status tmf_chat_encode(const tmf_model *m, const char *messages, size_t bytes, int flags,
                           int32_t *ids, size_t cap, size_t *n, tmf_error *e)
{
    api_request q;
    token_list l = {0};
    err failed;
    err_code rc = parse(&q, m, messages, bytes, &failed);
    if (rc == OK) {
        const chat_request r = request_of(&q, flags);
        rc = chat_encode_request(m->c, &r, &l, &failed);
        api_request_free(&q);
    }
    return give_ids(&failed, rc, &l, ids, cap, n, e);
}

tmf_status tmf_chat_render(const tmf_model *m, const char *messages, size_t bytes, int flags,
                           char *text, size_t cap, size_t *n, tmf_error *e)
{
    api_request q;
    char *all = NULL;
    err failed;
    err_code rc = parse(&q, m, messages, bytes, &failed);
    if (rc == OK) {
        const chat_request r = request_of(&q, flags);
        rc = chat_render_request(m->c, &r, &all, &failed);
        api_request_free(&q);
    }
    return give_text(&failed, rc, all, all ? strlen(all) : 0, text, cap, n, e);
}
