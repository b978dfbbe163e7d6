#include "support/hf_case.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/json.h"
#include "base/mem.h"
#include "formats/safetensors.h"
#include "support/suite.h"
#include "support/tempdir.h"
#include "support/tiny_dir.h"

char hf_case_dir[64];
err hf_err;

void hf_setup(void) { tempdir_make(hf_case_dir, sizeof hf_case_dir); }
void hf_teardown(void) { tempdir_drop(hf_case_dir); }

const char *hf_in(const char *name)
{
    static char path[2][512];
    static int turn;
    turn = !turn;
    (void)snprintf(path[turn], sizeof path[turn], "%s/%s", hf_case_dir, name);
    return path[turn];
}

static const hf_change *find_change(const hf_change *c, int n, const char *name)
{
    for (int i = 0; i < n; i++)
        if (strcmp(c[i].name, name) == 0) return &c[i];
    return NULL;
}

void hf_copy(const char *from, const char *to, int part, int parts, const hf_change *c, int n)
{
    st_file *f;
    st_writer *w;
    char source[512];
    (void)snprintf(source, sizeof source, "%s", hf_in(from));
    ck_assert_msg(st_open(&f, source, &hf_err) == OK, "%s", hf_err.msg);
    ck_assert_msg(st_writer_open(&w, hf_in(to), (const char *const[]){"format", "pt", NULL}, true,
                                 &hf_err) == OK,
                  "%s", hf_err.msg);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = part; i < st_count(f); i += parts) {
            const st_entry t = st_at(f, i);
            if (find_change(c, n, t.name)) continue;
            if (pass)
                ck_assert_msg(st_writer_data(w, t.name, &t.view, &hf_err) == OK, "%s", hf_err.msg);
            else
                ck_assert_msg(
                    st_writer_add(w, t.name, t.view.dt, t.view.ndim, t.view.shape, &hf_err) == OK,
                    "%s", hf_err.msg);
        }
        for (int i = 0; i < n && part == 0; i++) {
            if (c[i].op == HF_DROP) continue;
            if (!pass) {
                ck_assert_msg(
                    st_writer_add(w, c[i].name, c[i].dt, c[i].ndim, c[i].shape, &hf_err) == OK,
                    "%s", hf_err.msg);
                continue;
            }
            const tensor v = tensor_of(NULL, c[i].dt, c[i].ndim, c[i].shape);
            void *zeros = calloc(tensor_bytes(&v) + 1, 1);
            const tensor put = tensor_of(c[i].data ? (void *)(uintptr_t)c[i].data : zeros, c[i].dt,
                                         c[i].ndim, c[i].shape);
            ck_assert_msg(st_writer_data(w, c[i].name, &put, &hf_err) == OK, "%s", hf_err.msg);
            free(zeros);
        }
    }
    ck_assert_msg(st_writer_commit(&w, &hf_err) == OK, "%s", hf_err.msg);
    st_close(&f);
}

void hf_rewrite(const hf_change *c, int n)
{
    hf_copy("model.safetensors", "model.safetensors", 0, 1, c, n);
}

void hf_part_name(char *buf, size_t cap, int part, int parts)
{
    (void)snprintf(buf, cap, "model-%05d-of-%05d.safetensors", part + 1, parts);
}

void hf_split(int parts, bool index)
{
    cJSON *o = cJSON_CreateObject(), *map = cJSON_AddObjectToObject(o, "weight_map");
    char name[64], *text;
    for (int p = 0; p < parts; p++) {
        st_file *f;
        hf_part_name(name, sizeof name, p, parts);
        hf_copy("model.safetensors", name, p, parts, NULL, 0);
        ck_assert(st_open(&f, hf_in(name), &hf_err) == OK);
        for (int64_t i = 0; i < st_count(f); i++)
            (void)cJSON_AddStringToObject(map, st_at(f, i).name, name);
        st_close(&f);
    }
    ck_assert(json_print(&text, o, true, &hf_err) == OK);
    if (index) tiny_file_write(hf_case_dir, "model.safetensors.index.json", text);
    mem_free(text);
    cJSON_Delete(o);
    ck_assert_int_eq(unlink(hf_in("model.safetensors")), 0);
}

void hf_edit(const char *file, const char *old, const char *new)
{
    char *text, *at, *out;
    size_t n;
    ck_assert_msg(file_read(&text, &n, hf_in(file), 1 << 20, &hf_err) == OK, "%s", hf_err.msg);
    at = strstr(text, old);
    ck_assert_msg(at, "%s: no '%s'", file, old);
    out = malloc(n + strlen(new) + 1);
    (void)sprintf(out, "%.*s%s%s", (int)(at - text), text, new, at + strlen(old));
    tiny_file_write(hf_case_dir, file, out);
    free(out);
    mem_free(text);
}

void hf_opens(void)
{
    weight_src *s;
    ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
    weights_close(&s);
}

void hf_refused(err_code code, const char *fragment)
{
    weight_src *s;
    const err_code rc = weights_open(&s, hf_case_dir, &hf_err);
    ck_assert_msg(rc == code, "'%s': expected %s, got %s %s", fragment, err_name(code),
                  err_name(rc), rc ? hf_err.msg : "");
    ck_assert_ptr_null(s);
    ck_assert_msg(strstr(hf_err.msg, fragment), "'%s' lacks '%s'", hf_err.msg, fragment);
    ck_assert_msg(strstr(hf_err.msg, hf_case_dir), "'%s' does not name the directory", hf_err.msg);
    for (const char *p = hf_err.msg; *p; p++) ck_assert_int_ge((unsigned char)*p, 0x20);
}

void hf_llama(void)
{
    const model_desc m = tiny_llama();
    tiny_dir_make(hf_case_dir, &m, 1);
}

void hf_digest_of(char out[65])
{
    weight_src *s;
    ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
    (void)snprintf(out, 65, "%s", weights_digest(s));
    weights_close(&s);
}

TCase *hf_cases_of(const char *name, Suite *s)
{
    TCase *t = tcase_create(name);
    tcase_add_checked_fixture(t, hf_setup, hf_teardown);
    tcase_set_timeout(t, 60);
    suite_add_tcase(s, t);
    return t;
}

int hf_run(Suite *s)
{
    if (access("/dev/shm", W_OK) == 0)
        (void)setenv("TMPDIR", "/dev/shm", 0); /* syncs cost nothing there */
    return suite_run(s);
}
