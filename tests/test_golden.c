/* The 16-bit path against golden files made by other programs: next-token log-probabilities, chat
 * prompts, greedy ids under teacher forcing where the margin decides, perplexity of the bundled
 * dialogues and of 20 windows of text with 16, 8 and 4 bit caches. Arguments: names of models to
 * check (none: all). The bundled model is always there; the others, and the text, need the shared
 * test data: SKIP without. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "datasets/corpus.h"
#include "formats/family.h"
#include "formats/tokenizer.h"
#include "runtime/score.h"

#define NEAR_MARGIN  0.05 /* below it another precision may rightly pick the other token */
#define NEAR_LOGPROB 0.02
#define NEAR_PPL     0.002
#define NEAR_KV8     0.0005
#define NEAR_KV4     0.005 /* over what the reference's own int4 cache costs on the whole text */

static int failures, checks;

static void check(bool ok, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void check(bool ok, const char *fmt, ...)
{
    va_list args;
    checks++;
    if (ok) return;
    failures++;
    va_start(args, fmt);
    (void)fputs("FAIL ", stdout);
    (void)vprintf(fmt, args);
    (void)putchar('\n');
    va_end(args);
}

typedef struct {
    char name[64], dir[512];
    device *d;
    weight_src *src;
    tokenizer *t;
    model *m;
    cJSON *golden;
} subject;

static err_code subject_open(subject *s, const char *name, const char *dir, kv_format kv, err *e)
{
    const model_opts o = {.kv = kv, .kv_share = 0.5};
    memset(s, 0, sizeof *s);
    (void)snprintf(s->name, sizeof s->name, "%s", name);
    (void)snprintf(s->dir, sizeof s->dir, "%s", dir);
    TRY(dev_open(&s->d, &(dev_opts){.kind = DEV_CPU}, e));
    TRY(weights_open(&s->src, dir, e));
    TRY(tokenizer_open(&s->t, weights_tokenizer_dir(s->src), e));
    return model_open(&s->m, s->d, s->src, &o, NULL, e);
}

static void subject_close(subject *s)
{
    model_close(&s->m);
    tokenizer_close(&s->t);
    weights_close(&s->src);
    dev_close(&s->d);
    cJSON_Delete(s->golden);
}

static int32_t *int_list(const cJSON *o, const char *key, int32_t *n)
{
    const cJSON *a = cJSON_GetObjectItem(o, key), *x;
    *n = cJSON_GetArraySize(a);
    int32_t *out = calloc((size_t)*n + 1, sizeof *out), i = 0;
    if (!out) abort();
    cJSON_ArrayForEach(x, a) out[i++] = (int32_t)x->valuedouble;
    return out;
}

static double number(const cJSON *a, int i)
{
    const cJSON *x = cJSON_GetArrayItem(a, i);
    return x ? x->valuedouble : NAN;
}

/* ---- log-probabilities ---- */

static void check_top(subject *s, const cJSON *c, const char *what)
{
    int32_t n, n_top, found;
    err e;
    const int32_t vocab = weights_desc(s->src)->vocab;
    int32_t *ids = int_list(c, "ids", &n), *top = int_list(c, "top10", &n_top);
    id_logprob *all = calloc((size_t)vocab, sizeof *all);
    if (!all) abort();
    const err_code rc = score_next(s->m, ids, n, vocab, all, &found, NULL, &e);
    check(rc == OK, "%s %s: %s", s->name, what, e.msg);
    for (int32_t i = 0; rc == OK && i < n_top; i++) {
        const double want = number(cJSON_GetObjectItem(c, "logprobs"), i);
        int32_t at = 0;
        while (at < found && all[at].id != top[i]) at++;
        check(at < found && fabs(all[at].logprob - want) < NEAR_LOGPROB,
              "%s %s: id %d: expected log-probability %.5f, got %.5f", s->name, what, top[i], want,
              at < found ? all[at].logprob : NAN);
    }
    free(all);
    free(ids);
    free(top);
}

/* ---- greedy ids ---- */

/* Distance between the best two logits; *best is the id of the first. */
static double margin_of(const float *l, int32_t vocab, int32_t *best)
{
    float first = -INFINITY, second = -INFINITY;
    for (int32_t i = 0; i < vocab; i++) {
        if (l[i] > first) {
            second = first;
            first = l[i];
            *best = i;
        } else if (l[i] > second) {
            second = l[i];
        }
    }
    return (double)first - (double)second;
}

/* The prompt and the golden answer go through in one step; each row's best id is the next golden
 * one wherever its margin (the golden one, or ours where the file has none) decides. */
static void check_forced(subject *s, const char *what, const int32_t *prompt, int32_t n_prompt,
                         const int32_t *answer, int32_t n_answer, const cJSON *margins)
{
    err e;
    const int32_t n = n_prompt + n_answer - 1;
    const int32_t vocab = weights_desc(s->src)->vocab;
    int32_t *ids = calloc((size_t)n + 1, sizeof *ids), best = -1;
    float *logits = calloc((size_t)n_answer * (size_t)vocab, sizeof *logits);
    int decided = 0;
    if (!ids || !logits) abort();
    memcpy(ids, prompt, (size_t)n_prompt * sizeof *ids);
    memcpy(ids + n_prompt, answer, (size_t)(n_answer - 1) * sizeof *ids);
    const step_seq q = {.tokens = ids, .n_tokens = n, .n_out = n_answer, .logits = logits};
    model_seq_end(s->m, 0);
    const err_code rc = model_step(s->m, &q, 1, NULL, &e);
    check(rc == OK, "%s %s: %s", s->name, what, e.msg);
    for (int32_t i = 0; rc == OK && i < n_answer; i++) {
        const double ours = margin_of(logits + (size_t)i * (size_t)vocab, vocab, &best);
        if ((margins ? number(margins, i) : ours) < NEAR_MARGIN) continue;
        check(best == answer[i], "%s %s: step %d: expected id %d, got %d", s->name, what, i,
              answer[i], best);
        decided++;
    }
    check(decided * 2 > n_answer, "%s %s: only %d of %d steps were decided", s->name, what, decided,
          n_answer);
    model_seq_end(s->m, 0);
    free(ids);
    free(logits);
}

static void check_greedy(subject *s, const cJSON *c, const char *ids_key, const char *answer_key,
                         const char *what)
{
    int32_t n, n_answer;
    int32_t *ids = int_list(c, ids_key, &n), *answer = int_list(c, answer_key, &n_answer);
    check_forced(s, what, ids, n, answer, n_answer, cJSON_GetObjectItem(c, "margins"));
    free(ids);
    free(answer);
}

/* ---- perplexity ---- */

static double ppl_of(subject *s, const token_list *ids)
{
    const ppl_opts o = {1024, 20};
    ppl_result r;
    err e;
    const err_code rc = ppl_run(&r, s->m, ids->ids, ids->n, &o, NULL, &e);
    check(rc == OK, "%s: perplexity: %s", s->name, e.msg);
    return rc == OK ? r.ppl : NAN;
}

static err_code text_ids(token_list *out, const tokenizer *t, const char *path, err *e)
{
    char *text;
    size_t n;
    TRY(file_read(&text, &n, path, (size_t)64 << 20, e));
    err_code rc = tokenizer_add_bos(t) ? token_list_push(out, tokenizer_bos(t), e) : OK;
    if (rc == OK) rc = tokenizer_encode(t, text, n, false, out, e);
    mem_free(text);
    return rc;
}

/* What the int4 cache of an outside forward pass costs (quality.json), as a factor. */
static double reference_kv4(const subject *s)
{
    char path[600];
    cJSON *q;
    err e;
    (void)snprintf(path, sizeof path, "%s/quality.json", s->dir);
    if (json_load(&q, path, (size_t)1 << 20, &e) != OK) return 1;
    const cJSON *a = cJSON_GetObjectItem(cJSON_GetObjectItem(q, "kv4"), "wikitext2_test");
    const cJSON *b = cJSON_GetObjectItem(cJSON_GetObjectItem(q, "kv16"), "wikitext2_test");
    const double r = a && b ? a->valuedouble / b->valuedouble : 1;
    cJSON_Delete(q);
    return r;
}

static void check_ppl(subject *s)
{
    static const kv_format formats[] = {KV_8, KV_4};
    const cJSON *g = cJSON_GetObjectItem(cJSON_GetObjectItem(s->golden, "ppl"), "wikitext2_test");
    const double want = cJSON_GetObjectItem(g, "ppl_first_20_windows")->valuedouble;
    token_list ids = {0};
    err e;
    const err_code rc = text_ids(&ids, s->t, TMF_SHARED_DIR "/data/text/wikitext-2/test.txt", &e);
    check(rc == OK, "%s: %s", s->name, e.msg);
    /* `tokens` of the golden files counts the BOS where there is one. */
    check(ids.n == (int64_t)cJSON_GetObjectItem(g, "tokens")->valuedouble,
          "%s: %lld tokens, expected %.0f", s->name, (long long)ids.n,
          cJSON_GetObjectItem(g, "tokens")->valuedouble);
    const double full = ppl_of(s, &ids);
    check(fabs(full / want - 1) < NEAR_PPL, "%s: perplexity: expected %.5f, got %.5f", s->name,
          want, full);
    (void)printf("%s: perplexity %.5f (golden %.5f)", s->name, full, want);
    for (int i = 0; i < 2; i++) {
        subject q;
        if (subject_open(&q, s->name, s->dir, formats[i], &e) != OK) {
            check(false, "%s: %s", s->name, e.msg);
        } else {
            const double p = ppl_of(&q, &ids);
            if (formats[i] == KV_8)
                check(fabs(p / full - 1) < NEAR_KV8, "%s: KV8: %.5f beside %.5f", s->name, p, full);
            else
                check(p > full && p / full < reference_kv4(s) + NEAR_KV4,
                      "%s: KV4: %.5f beside %.5f", s->name, p, full);
            (void)printf(", KV%d %.5f", (int)formats[i], p);
        }
        subject_close(&q);
    }
    (void)putchar('\n');
    token_list_free(&ids);
}

/* The bundled dialogues through the chat template against the NumPy pass (golden_eval.json). */
static void check_eval(subject *s)
{
    char path[600];
    cJSON *g = NULL;
    chat *c = NULL;
    token_list ids = {0};
    ppl_result r;
    err e;
    const ppl_opts o = {1024, 20};
    const corpus_read how = {0};
    (void)snprintf(path, sizeof path, "%s/golden_eval.json", s->dir);
    err_code rc = json_load(&g, path, (size_t)1 << 20, &e);
    (void)snprintf(path, sizeof path, "%s/eval.jsonl", s->dir);
    if (rc == OK)
        rc = chat_open(&c, s->t, NULL, family_chat_template(weights_desc(s->src)), NULL, &e);
    if (rc == OK) rc = corpus_tokens(&ids, path, &how, s->t, c, NULL, &e);
    if (rc == OK) rc = ppl_run(&r, s->m, ids.ids, ids.n, &o, NULL, &e);
    check(rc == OK, "%s: eval: %s", s->name, e.msg);
    if (rc == OK) {
        const double want = cJSON_GetObjectItem(g, "ppl_first_20_windows")->valuedouble;
        const double n = cJSON_GetObjectItem(g, "ids")->valuedouble;
        check((double)ids.n == n, "%s: eval: %lld ids, expected %.0f", s->name, (long long)ids.n,
              n);
        check(fabs(r.ppl / want - 1) < NEAR_PPL, "%s: eval: expected %.5f, got %.5f", s->name, want,
              r.ppl);
        (void)printf("%s: perplexity of the dialogues %.5f (golden %.5f)\n", s->name, r.ppl, want);
    }
    token_list_free(&ids);
    chat_close(&c);
    cJSON_Delete(g);
}

/* ---- models ---- */

static void check_chat_prompt(subject *s, const cJSON *c, const char *what)
{
    const cJSON *x, *list = cJSON_GetObjectItem(c, "messages");
    chat_message m[16] = {{0}};
    int n = 0;
    int32_t n_want, *want = int_list(c, "ids", &n_want);
    token_list ids = {0};
    chat *ch = NULL;
    err e;
    cJSON_ArrayForEach(x, list)
    {
        m[n].role = cJSON_GetObjectItem(x, "role")->valuestring;
        m[n++].content = cJSON_GetObjectItem(x, "content")->valuestring;
    }
    err_code rc = chat_open(&ch, s->t, NULL, family_chat_template(weights_desc(s->src)), NULL, &e);
    if (rc == OK) rc = chat_encode(ch, m, n, NULL, true, &ids, &e);
    check(rc == OK, "%s %s: %s", s->name, what, e.msg);
    check(ids.n == n_want && memcmp(ids.ids, want, (size_t)n_want * sizeof *want) == 0,
          "%s %s: the prompt's ids differ", s->name, what);
    token_list_free(&ids);
    chat_close(&ch);
    free(want);
}

static void check_ours(const char *name, const char *dir, bool with_text)
{
    char path[600], what[64];
    const cJSON *c;
    subject s;
    err e;
    int i = 0;
    (void)snprintf(path, sizeof path, "%s/golden.json", dir);
    err_code rc = subject_open(&s, name, dir, KV_16, &e);
    if (rc == OK) rc = json_load(&s.golden, path, (size_t)1 << 20, &e);
    check(rc == OK, "%s: %s", name, e.msg);
    if (rc == OK) {
        cJSON_ArrayForEach(c, cJSON_GetObjectItem(s.golden, "completions"))
        {
            (void)snprintf(what, sizeof what, "completion %d", i++);
            check_top(&s, c, what);
            check_greedy(&s, c, "ids", "greedy", what);
        }
        i = 0;
        cJSON_ArrayForEach(c, cJSON_GetObjectItem(s.golden, "chats"))
        {
            (void)snprintf(what, sizeof what, "chat %d", i++);
            check_chat_prompt(&s, c, what);
            check_greedy(&s, c, "ids", "greedy", what);
        }
        check(i > 0, "%s: no chats in the golden file", name);
        if (with_text)
            check_ppl(&s);
        else
            check_eval(&s);
    }
    subject_close(&s);
}

/* One line of the stories model's golden file: logits behind a prompt and greedy ids, or
 * log-probabilities of given ids under teacher forcing. */
static void check_stories_line(subject *s, const cJSON *c, int line)
{
    char what[64];
    err e;
    int32_t n, vocab = weights_desc(s->src)->vocab;
    const cJSON *want = cJSON_GetObjectItem(c, "logits_after_prompt");
    (void)snprintf(what, sizeof what, "line %d", line);
    if (want) {
        int32_t *ids = int_list(c, "prompt_ids", &n);
        float *l = calloc((size_t)vocab, sizeof *l);
        if (!l) abort();
        const step_seq q = {.tokens = ids, .n_tokens = n, .n_out = 1, .logits = l};
        const err_code rc = model_step(s->m, &q, 1, NULL, &e);
        check(rc == OK, "%s %s: %s", s->name, what, e.msg);
        double worst = 0;
        for (int32_t i = 0; i < vocab; i++)
            worst = fmax(worst, fabs((double)l[i] - number(want, i)));
        check(worst < NEAR_LOGPROB, "%s %s: logits differ by %g", s->name, what, worst);
        model_seq_end(s->m, 0);
        free(l);
        free(ids);
        check_greedy(s, c, "prompt_ids", "generated_ids", what);
        return;
    }
    const cJSON *lp = cJSON_GetObjectItem(c, "logprobs");
    int32_t *ids = int_list(c, "prompt_ids", &n);
    const int32_t m = cJSON_GetArraySize(lp), n_out = n - 1;
    float *nll = calloc((size_t)n + 1, sizeof *nll);
    if (!nll) abort();
    const step_seq q = {
        .tokens = ids, .n_tokens = n - 1, .n_out = n_out, .nll = nll, .targets = ids + 1};
    const err_code rc = model_step(s->m, &q, 1, NULL, &e);
    check(rc == OK && m == n_out, "%s %s: %d log-probabilities for %d ids: %s", s->name, what, m, n,
          rc == OK ? "" : e.msg);
    for (int32_t i = 0; rc == OK && i < m && i < n_out; i++)
        check(fabs((double)nll[i] + number(lp, i)) < NEAR_LOGPROB,
              "%s %s: row %d: expected %.5f, got %.5f", s->name, what, i, number(lp, i),
              -(double)nll[i]);
    model_seq_end(s->m, 0);
    free(nll);
    free(ids);
}

static void check_stories(void)
{
    subject s;
    err e;
    char *text = NULL;
    size_t n;
    int line = 0;
    err_code rc = subject_open(&s, "stories260K", TMF_SHARED_DIR "/data/models/stories260K/hf",
                               KV_16, &e);
    if (rc == OK)
        rc = file_read(&text, &n, TMF_SHARED_DIR "/data/models/stories260K/golden-shared.jsonl",
                       (size_t)1 << 20, &e);
    check(rc == OK, "stories260K: %s", e.msg);
    for (char *p = text; rc == OK && p && *p;) {
        char *end = strchr(p, '\n');
        cJSON *c;
        if (json_parse(&c, p, end ? (size_t)(end - p) : strlen(p), "golden line", &e) != OK) {
            check(false, "stories260K: %s", e.msg);
            break;
        }
        check_stories_line(&s, c, ++line);
        cJSON_Delete(c);
        p = end ? end + 1 : NULL;
    }
    (void)printf("stories260K: %d lines\n", line);
    mem_free(text);
    subject_close(&s);
}

static bool wanted(int argc, char **argv, const char *name)
{
    for (int k = 1; k < argc; k++) {
        if (strcmp(argv[k], name) == 0) return true;
    }
    return argc < 2;
}

int main(int argc, char **argv)
{
    static const char *const ours[] = {"demo", "base", "qwen"};
    const bool shared = access(TMF_SHARED_DIR "/models/base/golden.json", R_OK) == 0;
    (void)setvbuf(stdout, NULL, _IOLBF, 0);
    if (wanted(argc, argv, "bundled"))
        check_ours("bundled", TMF_SOURCE_DIR "/datasets/demo", false);
    for (size_t i = 0; shared && i < sizeof ours / sizeof *ours; i++) {
        char dir[512];
        (void)snprintf(dir, sizeof dir, "%s/models/%s", TMF_SHARED_DIR, ours[i]);
        if (wanted(argc, argv, ours[i])) check_ours(ours[i], dir, true);
    }
    if (shared && wanted(argc, argv, "stories260K")) check_stories();
    if (!shared)
        (void)printf("SKIP demo, base, qwen and stories260K: %s is not there\n", TMF_SHARED_DIR);
    (void)printf("%d checks, %d failures\n", checks, failures);
    if (failures) return EXIT_FAILURE;
    return shared ? EXIT_SUCCESS : 77;
}
