/* The text of an answer as its tokens come: decoded, and what may still turn into a stop text held
 * back. A stop text is found wherever token borders fall: the one that ends first, of two that end
 * together the longer. Text is handed out in whole characters. */
#ifndef TMF_RUNTIME_TEXT_STREAM_H
#define TMF_RUNTIME_TEXT_STREAM_H

#include "formats/tokenizer.h"

#define TEXT_STREAM_MAX_PIECE (64 << 10) /* bytes of a token, at most */

typedef struct text_stream text_stream;
/* `t` is borrowed. stop_bytes: of all stop texts together, at most; piece_bytes: of the tokenizer's
 * longest token, 0 for TEXT_STREAM_MAX_PIECE. Allocates all that it will ever need. */
err_code text_stream_open(text_stream **out, const tokenizer *t, int max_stops, size_t stop_bytes,
                          size_t piece_bytes, err *e);
void text_stream_close(text_stream **s); /* NULL accepted */
/* Begins an answer: nothing waits. Stop texts are UTF-8, not empty, and copied. E_USAGE: more of
 * them than it was opened for. skip_special leaves the text of special tokens out. */
err_code text_stream_start(text_stream *s, const char *const *stops, int n_stops, bool skip_special,
                           err *e);
/* Adds a token. *stop: the stop text that is complete with it, -1 none. Then what is ready ends
 * before that text, and nothing may be added. */
err_code text_stream_add(text_stream *s, int32_t id, int *stop, err *e);
/* Nothing comes any more: all that waits becomes ready (U+FFFD for a character that was cut).
 * Behind a stop text it does nothing. */
void text_stream_flush(text_stream *s);
/* What is certain, oldest first; borrowed until the next call on s. */
const char *text_stream_ready(const text_stream *s, size_t *n);
/* Forgets what was ready. */
void text_stream_taken(text_stream *s);

#endif
