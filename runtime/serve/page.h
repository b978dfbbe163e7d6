/* The chat page (page.html), put into the binary when it is built (tools/embed_page.c). */
#ifndef TMF_RUNTIME_SERVE_PAGE_H
#define TMF_RUNTIME_SERVE_PAGE_H

#include <stddef.h>

extern const unsigned char serve_page[]; /* [serve_page_bytes] UTF-8, text/html */
extern const size_t serve_page_bytes;
/* The Content-Security-Policy it is to be sent with: its own script and style by their hashes,
 * requests to its own server, nothing else. */
extern const char serve_page_csp[];

#endif
