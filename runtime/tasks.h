/* Exact match of greedy replies to dialogues: lines {"kind", "messages", "answer"}. */
#ifndef TMF_RUNTIME_TASKS_H
#define TMF_RUNTIME_TASKS_H

#include "formats/chat.h"
#include "runtime/model.h"

#define TASKS_MAX_KINDS 64
#define TASKS_MAX_STOP  16

typedef struct tasks tasks;
/* Reads and encodes all lines. E_INPUT names file and line. t and c are borrowed until tasks_close.
 */
err_code tasks_open(tasks **out, const char *path, const tokenizer *t, const chat *c,
                    const char *meta_instruction, err *e);
void tasks_close(tasks **k);
int32_t tasks_count(const tasks *k);
int32_t tasks_longest(const tasks *k); /* ids of the longest prompt */

typedef struct {
    int32_t max_new;         /* a reply that does not stop within so many tokens is wrong */
    const int32_t *stop_ids; /* [n_stop_ids], at most TASKS_MAX_STOP */
    int n_stop_ids;
    /* Every wrong reply, in no particular order; NULL: none. */
    void (*on_wrong)(void *ud, int32_t line, const char *kind, const char *expected,
                     const char *got);
    void *ud;
} tasks_opts;
typedef struct {
    const char *kind; /* borrowed from the tasks */
    int32_t total, right;
} task_score;
typedef struct {
    task_score kind[TASKS_MAX_KINDS]; /* in order of first appearance */
    int n_kinds;
    int32_t total, right;
} tasks_result;
/* Answers all, as many at once as the model has slots. Ends every slot. */
err_code tasks_run(tasks_result *r, const tasks *k, model *m, const tasks_opts *o, const job *j,
                   err *e);

#endif
