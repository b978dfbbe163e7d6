/* st_dump FILE...: what our reader makes of safetensors files, for comparison with other readers.
 * For each file a line "ok PATH" with a line "name dtype [shape] sha256" (the name in hex) for each
 * tensor, or a line "refused CODE message". */
#include <stdio.h>

#include "base/hash.h"
#include "formats/safetensors.h"

static int dump(const char *path)
{
    st_file *f;
    err e;
    if (st_open(&f, path, &e) != OK) {
        printf("refused %s %s\n", err_name(e.code), e.msg);
        return 0;
    }
    printf("ok %s\n", path);
    for (int64_t i = 0; i < st_count(f); i++) {
        const st_entry t = st_at(f, i);
        hash256 h;
        if (hash_sha256(&h, t.view.data, tensor_bytes(&t.view), &e) != OK) return 1;
        for (const char *c = t.name; *c; c++) printf("%02x", (unsigned char)*c);
        printf("\t%s\t[", dtype_name(t.view.dt));
        for (int k = 0; k < t.full_ndim; k++)
            printf("%s%lld", k ? ", " : "", (long long)t.full_shape[k]);
        printf("]\t%s\n", h.hex);
    }
    st_close(&f);
    return 0;
}

int main(int argc, char **argv)
{
    int bad = 0;
    for (int i = 1; i < argc; i++) bad |= dump(argv[i]);
    return bad;
}
