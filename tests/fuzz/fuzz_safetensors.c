/* Any bytes as a safetensors file: refused with a message, or a file whose every view lies inside
 * it and whose names find their own tensors. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "formats/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    st_file *f;
    err e = {OK, ""};
    size_t head, sum = 0;
    if (st_open_memory(&f, data, n, "fuzz", &e) != OK) {
        need(f == NULL && e.code != OK && strlen(e.msg) > 6 && !strchr(e.msg, '\n'));
        return 0;
    }
    (void)st_head(f, &head);
    for (int64_t i = 0; i < st_count(f); i++) {
        const st_entry t = st_at(f, i);
        tensor v;
        const size_t bytes = tensor_bytes(&t.view);
        need(st_find(f, t.name, &v) && v.data == t.view.data);
        need((const uint8_t *)v.data == data + head + sum);
        need(tensor_contiguous(&v));
        sum += bytes;
        need(head + sum <= n);
        (void)st_get(f, t.name, &v, &e);
    }
    need(head + sum == n);
    (void)st_meta(f, "format");
    st_close(&f);
    return 0;
}
