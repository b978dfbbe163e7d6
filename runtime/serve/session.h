/* Conversations that the server keeps: the token ids and the words so far, under the number that
 * the client gave. Bounded: the one that was idle longest makes room. */
#ifndef TMF_RUNTIME_SERVE_SESSION_H
#define TMF_RUNTIME_SERVE_SESSION_H

#include "base/err.h"
#include "formats/chat.h"

typedef struct session_table session_table;
/* At most max_sessions with max_tokens ids in all; four bytes of words count as an id. */
err_code session_table_open(session_table **out, int32_t max_sessions, int64_t max_tokens, err *e);
void session_table_close(session_table **t); /* NULL accepted; none may be held */

typedef struct session session;
/* Holds the session of this owner (its key) and number, a new one when there is none: E_BUSY while
 * another request holds it. Any thread. */
err_code session_take(session **out, session_table *t, uint64_t owner, int64_t id, err *e);
/* Its ids and the last one's role: the holder's to change. */
token_list *session_ids(session *s);
int32_t *session_last(session *s); /* the last generated id, -1: cut */
/* The words behind those ids, for templates that show a turn by what follows it. One more (copied);
 * [n] of them, borrowed until the next is added, NULL when not all could be kept. */
void session_say(session *s, const chat_message *m);
const chat_message *session_said(const session *s, int64_t *n);
/* Asked to stop (session_cancel) since it was taken. */
bool session_canceled(const session *s);
/* The end of holding it; keep: for the next request, else it is forgotten. */
void session_give(session_table *t, session **s, bool keep);
/* Tells the holder to stop; false when nobody holds such a session. */
bool session_cancel(session_table *t, uint64_t owner, int64_t id);

#endif
