/* Stop texts are looked for byte by byte with the failure function of Knuth, Morris and Pratt: the
 * work for a token does not grow with the length of a stop text, and how many bytes must wait is
 * the longest of their states. */
#include "runtime/text_stream.h"

#include <string.h>

#include "base/mem.h"

#define FLUSH_BYTES 16 /* what tokenizer_decode_flush may give */

typedef struct {
    size_t at, len; /* in `stops`, and its failure function in `fail` */
    size_t state;   /* bytes of it that the text's end matches */
} stop_text;

struct text_stream {
    const tokenizer *t;
    char *text; /* [cap] */
    size_t n, ready, cap;
    char *stops;     /* [stop_bytes] */
    uint32_t *fail;  /* [stop_bytes] */
    stop_text *list; /* [max_stops] */
    size_t stop_bytes;
    int n_stops, max_stops;
    bool skip_special, stopped;
    decode_state decode;
};

err_code text_stream_open(text_stream **out, const tokenizer *t, int max_stops, size_t stop_bytes,
                          size_t piece_bytes, err *e)
{
    void *p;
    err_code rc;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(text_stream), "answer text", e));
    text_stream *s = p;
    s->t = t;
    s->max_stops = max_stops;
    s->stop_bytes = stop_bytes;
    s->cap = 3 * (piece_bytes ? piece_bytes : TEXT_STREAM_MAX_PIECE) + 2 * FLUSH_BYTES + stop_bytes;
    if ((rc = mem_alloc(&p, s->cap, 1, "answer text", e)) != OK) goto done;
    s->text = p;
    if ((rc = mem_alloc(&p, stop_bytes, 1, "stop texts", e)) != OK) goto done;
    s->stops = p;
    if ((rc = mem_alloc(&p, stop_bytes, sizeof(uint32_t), "stop texts", e)) != OK) goto done;
    s->fail = p;
    if ((rc = mem_alloc(&p, (size_t)max_stops, sizeof(stop_text), "stop texts", e)) != OK)
        goto done;
    s->list = p;
    *out = s;
    s = NULL;
done:
    text_stream_close(&s);
    return rc;
}

void text_stream_close(text_stream **s)
{
    if (!s || !*s) return;
    mem_free((*s)->text);
    mem_free((*s)->stops);
    mem_free((*s)->fail);
    mem_free((*s)->list);
    mem_free(*s);
    *s = NULL;
}

/* fail[i]: how long a beginning of the text also ends at its byte i (shorter than i + 1). */
static void fill_fail(const char *text, size_t n, uint32_t *fail)
{
    size_t k = 0;
    fail[0] = 0;
    for (size_t i = 1; i < n; i++) {
        while (k && text[k] != text[i]) k = fail[k - 1];
        if (text[k] == text[i]) k++;
        fail[i] = (uint32_t)k;
    }
}

err_code text_stream_start(text_stream *s, const char *const *stops, int n_stops, bool skip_special,
                           err *e)
{
    size_t used = 0;
    if (n_stops > s->max_stops)
        return err_set(e, E_USAGE, "stop texts: expected at most %d, got %d", s->max_stops,
                       n_stops);
    for (int i = 0; i < n_stops; i++) {
        const size_t len = strlen(stops[i]);
        if (len == 0 || len > s->stop_bytes - used)
            return err_set(e, E_USAGE, "stop text %d: expected 1 to %zu bytes, got %zu", i,
                           s->stop_bytes - used, len);
        memcpy(s->stops + used, stops[i], len);
        fill_fail(s->stops + used, len, s->fail + used);
        s->list[i] = (stop_text){used, len, 0};
        used += len;
    }
    s->n_stops = n_stops;
    s->skip_special = skip_special;
    s->n = s->ready = 0;
    s->stopped = false;
    memset(&s->decode, 0, sizeof s->decode);
    return OK;
}

/* One byte of text; true when it completes the stop text. */
static bool stop_step(const text_stream *s, stop_text *x, char c)
{
    const char *text = s->stops + x->at;
    while (x->state && text[x->state] != c) x->state = s->fail[x->at + x->state - 1];
    if (text[x->state] == c) x->state++;
    return x->state == x->len;
}

/* Reads the bytes from `from` on. */
static int find_stop(text_stream *s, size_t from)
{
    for (size_t i = from; i < s->n; i++) {
        int hit = -1;
        for (int k = 0; k < s->n_stops; k++) {
            const bool done = stop_step(s, &s->list[k], s->text[i]);
            if (done && (hit < 0 || s->list[k].len > s->list[hit].len)) hit = k;
        }
        if (hit < 0) continue;
        s->n = s->ready = i + 1 - s->list[hit].len;
        s->stopped = true;
        return hit;
    }
    return -1;
}

err_code text_stream_add(text_stream *s, int32_t id, int *stop, err *e)
{
    size_t n = 0, held = 0;
    const size_t from = s->n;
    TRY(tokenizer_decode_next(s->t, &s->decode, id, s->skip_special, s->text + s->n, s->cap - s->n,
                              &n, e));
    s->n += n;
    *stop = find_stop(s, from);
    if (*stop >= 0) return OK;
    for (int k = 0; k < s->n_stops; k++)
        if (s->list[k].state > held) held = s->list[k].state;
    s->ready = s->n - held;
    return OK;
}

void text_stream_flush(text_stream *s)
{
    size_t n = 0;
    if (s->stopped) return;
    tokenizer_decode_flush(&s->decode, s->text + s->n, s->cap - s->n, &n);
    s->n += n;
    s->ready = s->n;
}

const char *text_stream_ready(const text_stream *s, size_t *n)
{
    *n = s->ready;
    return s->text;
}

void text_stream_taken(text_stream *s)
{
    memmove(s->text, s->text + s->ready, s->n - s->ready);
    s->n -= s->ready;
    s->ready = 0;
}
