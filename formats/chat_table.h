/* The rows of chat templates; not for callers. */
#ifndef TMF_FORMATS_CHAT_TABLE_H
#define TMF_FORMATS_CHAT_TABLE_H

#include <stdbool.h>

/* Stand for the tokenizer's BOS and EOS within the pieces of a row. */
#define CHAT_BOS "\x01"
#define CHAT_EOS "\x02"

typedef enum {
    BOS_TOKENIZER, /* one in front where the tokenizer adds one: the row says nothing */
    BOS_ROW        /* only where the row's pieces have it */
} chat_bos;

enum {
    CHAT_TRIM = 1, /* contents lose white space at both ends */
    CHAT_SYSTEM_IN_USER =
        2,              /* the system block stands inside the first user's turn, behind `user` */
    CHAT_NO_SYSTEM = 4, /* a system message is refused */
    CHAT_ALTERNATE = 8, /* after the system message: user, assistant, user, ... */
    CHAT_CUT_LAST =
        16,           /* an assistant's message at the end stays open: neither eoa nor a new head */
    CHAT_ROUNDS = 32, /* "[Round N]\n\n" before each user's turn */
    CHAT_END_EOS = 64,    /* EOS behind an assistant's message at the end, without a new head */
    CHAT_CUT_THINK = 128, /* of assistants' contents only what follows the last </think> */
    CHAT_SKIP_EMPTY = 256 /* an empty system message adds nothing */
};

typedef struct {
    const char *names; /* separated by '|': the first is the row's own */
    const char *begin; /* in front of everything, NULL nothing */
    const char *system, *eosys, *user, *eoh, *assistant, *eoa, *separator;
    const char *gen;            /* head of the turn to generate when it differs from `assistant` */
    const char *first_user;     /* before the first user's turn when no system block stands there */
    const char *meta_prefix;    /* in front of a meta instruction */
    const char *default_system; /* of templates that bring one; NULL none */
    const char *stop[4];        /* NULL-ended unless full */
    chat_bos bos;
    unsigned flags;
} chat_row;

extern const chat_row chat_rows[];
extern const int chat_n_rows;
const chat_row *chat_row_find(const char *name); /* NULL unknown */
/* A directory's chat_template: by its text, then (*exact false) by its marks; NULL when neither
 * tells. */
const chat_row *chat_row_of_text(const char *text, bool *exact);

#endif
