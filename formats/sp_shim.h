/* The sentencepiece library behind C: no exception and no C++ type crosses. */
#ifndef TMF_FORMATS_SP_SHIM_H
#define TMF_FORMATS_SP_SHIM_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sp_shim sp_shim;
typedef enum { SP_OK = 0, SP_BAD, SP_NOMEM, SP_STOPPED } sp_status;

/* Loads a serialized model (copied). On failure *out is NULL and msg (cap bytes) says why. */
sp_status sp_shim_open(sp_shim **out, const char *model, size_t n, char *msg, size_t cap);
void sp_shim_close(sp_shim *s); /* NULL accepted */
/* Calls push for every id of the text; push returns 0 to go on, anything else stops.
 * Thread-safe. */
sp_status sp_shim_encode(const sp_shim *s, const char *text, size_t n,
                         int (*push)(void *ctx, int id), void *ctx, char *msg, size_t cap);

#ifdef __cplusplus
}
#endif

#endif
