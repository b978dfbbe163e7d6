/* Two questions at once, their answers as they come.
 *
 *     cc generate.c $(pkg-config --cflags --libs tmforge) -o generate
 *     ./generate MODEL "What is 17 + 25?" "Who are you?" */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tmforge.h>

#define MOST 16

/* {"role":"user","content":"..."} in a list; quotes and the like in the question are escaped. */
static char *as_messages(const char *text)
{
    char *json = malloc(6 * strlen(text) + 64), *p = json;
    if (!json) return NULL;
    p += sprintf(p, "[{\"role\":\"user\",\"content\":\"");
    for (; *text; text++) {
        const unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\')
            p += sprintf(p, "\\%c", c);
        else if (c < 0x20)
            p += sprintf(p, "\\u%04x", c);
        else
            *p++ = (char)c;
    }
    (void)strcpy(p, "\"}]");
    return json;
}

static int32_t *ids_of(const tmf_model *m, const char *question, size_t *n, tmf_error *e)
{
    char *json = as_messages(question);
    int32_t *ids = NULL;
    if (json && tmf_chat_encode(m, json, strlen(json), 0, NULL, 0, n, e) == TMF_OK) {
        ids = malloc(*n * sizeof *ids);
        if (ids) (void)tmf_chat_encode(m, json, strlen(json), 0, ids, *n, n, e);
    }
    free(json);
    return ids;
}

/* The first answer is printed as it grows; the others are kept until they are whole. */
typedef struct {
    char *text[MOST];
    size_t n[MOST];
} answers;

static int on_piece(void *ud, const tmf_piece *p)
{
    answers *a = ud;
    char **text = &a->text[p->index];
    char *grown = realloc(*text, a->n[p->index] + p->n_text + 1);
    if (!grown) return 1;
    *text = grown;
    memcpy(grown + a->n[p->index], p->text, p->n_text + 1);
    a->n[p->index] += p->n_text;
    if (p->finish == TMF_FAILED) (void)fprintf(stderr, "%s\n", p->error.message);
    if (p->finish != TMF_RUNNING)
        (void)printf("%d: %s\n   (%d tokens read, %d written)\n", p->index + 1, *text, p->n_prompt,
                     p->n_new);
    return 0;
}

int main(int argc, char **argv)
{
    tmf_options o;
    tmf_gen_options g;
    tmf_model *m;
    tmf_error e = {0, ""};
    tmf_prompt prompts[MOST];
    answers a = {{0}, {0}};
    int n = 0;
    if (argc < 3 || argc - 2 > MOST) {
        (void)fprintf(stderr, "usage: generate MODEL QUESTION...\n");
        return 2;
    }
    tmf_options_init(&o, sizeof o);
    tmf_gen_options_init(&g, sizeof g);
    g.temperature = 0;
    g.max_new_tokens = 64;
    int rc = tmf_open(&m, argv[1], &o, &e);
    for (; rc == TMF_OK && n < argc - 2; n++) {
        prompts[n].options = &g;
        prompts[n].ids = ids_of(m, argv[n + 2], &prompts[n].n_ids, &e);
        if (!prompts[n].ids) rc = e.code ? e.code : TMF_E_NOMEM;
    }
    if (rc == TMF_OK) rc = tmf_generate(m, prompts, (size_t)n, on_piece, &a, &e);
    if (rc != TMF_OK) (void)fprintf(stderr, "generate: %s\n", e.message);
    for (int i = 0; i < n; i++) {
        free((void *)(uintptr_t)prompts[i].ids);
        free(a.text[i]);
    }
    tmf_close(&m);
    return rc == TMF_OK ? 0 : 1;
}
