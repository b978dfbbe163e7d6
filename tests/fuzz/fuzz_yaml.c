/* Any bytes as a workspace's config.yaml: refused with one line, or a value that survives printing,
 * and where it is a configuration, one whose file list is sound and which prints to itself. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "formats/tm_config.h"
#include "formats/yaml.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

static void refused(err_code rc, const err *e)
{
    need(e->code == rc && strlen(e->msg) > 6 && !strchr(e->msg, '\n'));
}

/* Printed and parsed again it is the same. */
static void there_and_back(const cJSON *o)
{
    char *text;
    cJSON *again;
    err e = {OK, ""};
    if (!cJSON_IsObject(o) || !o->child) return;
    need(yaml_print(&text, o, &e) == OK);
    need(yaml_parse(&again, text, strlen(text), "printed", &e) == OK);
    need(cJSON_Compare(o, again, true));
    cJSON_Delete(again);
    mem_free(text);
}

static void use_files(const tm_config *c)
{
    tm_file *f;
    size_t count;
    err e = {OK, ""};
    if ((int64_t)c->m.layers * c->tp > 256) return; /* only to keep the memory of a run small */
    const err_code rc = tm_config_files(&f, &count, c, &e);
    if (rc != OK) {
        refused(rc, &e);
        return;
    }
    for (size_t i = 0; i < count; i++)
        need(f[i].bytes > 0 && f[i].rows > 0 && f[i].cols > 0 && f[i].name[0]);
    mem_free(f);
}

static void use_config(const tm_config *c)
{
    tm_config again;
    char *text;
    cJSON *o;
    err e = {OK, ""};
    use_files(c);
    need(tm_config_print(&text, c, &e) == OK);
    need(yaml_parse(&o, text, strlen(text), "printed", &e) == OK);
    need(tm_config_read(&again, o, &e) == OK);
    need(again.m.layers == c->m.layers && again.m.ffn == c->m.ffn && again.m.heads == c->m.heads &&
         again.m.norm_eps == c->m.norm_eps && again.m.rope_theta == c->m.rope_theta &&
         again.m.scaling.kind == c->m.scaling.kind && again.m.w4_group == c->m.w4_group);
    cJSON_Delete(o);
    mem_free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    tm_config c;
    cJSON *o;
    err e = {OK, ""};
    err_code rc = yaml_parse(&o, (const char *)data, n, "fuzz", &e);
    if (rc != OK) {
        refused(rc, &e);
        return 0;
    }
    there_and_back(o);
    rc = tm_config_read(&c, o, &e);
    if (rc == OK)
        use_config(&c);
    else
        refused(rc, &e);
    cJSON_Delete(o);
    return 0;
}
