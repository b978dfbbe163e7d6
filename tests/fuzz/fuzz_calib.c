/* Any bytes as a calib file: refused with a message, or a file whose views have the shapes that it
 * states. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "formats/calib_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

static void look_at_layer(const calib_file *f, int32_t layer)
{
    calib_block b;
    err e = {OK, ""};
    if (calib_layer(f, layer, &b, &e) != OK) {
        need(e.code == E_INPUT && strlen(e.msg) > 6);
        return;
    }
    for (int i = 0; i < b.n_taps; i++) {
        const calib_tap *t = &b.tap[i];
        need(t->k > 0 && t->g > 0 && t->k % t->g == 0 && t->count >= 0);
        need(tensor_count(&t->absmax) == t->k && tensor_count(&t->abssum) == t->k);
        need(tensor_count(&t->blocks) == t->k * t->g);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    calib_file *f = NULL;
    err e = {OK, ""};
    if (calib_open_memory(&f, data, n, "fuzz", &e) != OK) {
        need(f == NULL && e.code != OK && strlen(e.msg) > 6 && !strchr(e.msg, '\n'));
        return 0;
    }
    const calib_info *i = calib_info_of(f);
    need(i->layers > 0 && i->model && i->tokenizer && i->options);
    const tensor tokens = calib_tokens(f), held = calib_held_out(f);
    need(tensor_count(&tokens) == (int64_t)i->samples * i->seqlen &&
         tensor_count(&held) == i->samples);
    for (int32_t l = 0; l < i->layers && l < 64; l++) look_at_layer(f, l);
    calib_close(&f);
    return 0;
}
