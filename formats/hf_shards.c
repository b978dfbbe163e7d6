/* Finding, opening and cross-checking the shards of a directory. */
#include "formats/hf_shards.h"

#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "base/json.h"
#include "base/mem.h"
#include "formats/st_header.h"

#define HF_INDEX     "model.safetensors.index.json"
#define HF_MAX_INDEX ((size_t)64 << 20)
enum { HF_MAX_SHARDS = 4096 };

typedef struct {
    char *name;
    st_file *st;
} hf_shard;
typedef struct {
    int32_t shard;
    int64_t item;
} hf_slot; /* shard is 1 + index, 0 empty */

struct hf_shards {
    char *dir;
    hf_shard *shard; /* [n], by name */
    int n;
    int64_t count;
    hf_slot *table; /* [table_size], open addressing by name */
    uint64_t table_size;
};

static bool ends_with(const char *s, const char *end)
{
    const size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

/* "model-00002-of-00005.safetensors": part 2 of 5. */
static bool part_of(const char *name, int *part, int *parts)
{
    int used = 0;
    return sscanf(name, "model-%5d-of-%5d.safetensors%n", part, parts, &used) == 2 && used > 0 &&
           !name[used];
}

/* ---- the list of files ---- */
static err_code add_shard(hf_shards *s, const char *name, err *e)
{
    for (int i = 0; i < s->n; i++)
        if (strcmp(s->shard[i].name, name) == 0) return OK;
    if (s->n == HF_MAX_SHARDS)
        return err_set(e, E_LIMIT, "'%s': more than %d safetensors files", s->dir, HF_MAX_SHARDS);
    TRY(mem_strdup(&s->shard[s->n].name, name, e));
    for (int i = s->n++; i > 0 && strcmp(s->shard[i].name, s->shard[i - 1].name) < 0; i--) {
        const hf_shard swap = s->shard[i];
        s->shard[i] = s->shard[i - 1];
        s->shard[i - 1] = swap;
    }
    return OK;
}

static err_code check_index_file(const hf_shards *s, const cJSON *entry, err *e)
{
    char shown[ST_SHOWN], path[4096];
    const char *file = cJSON_IsString(entry) ? entry->valuestring : NULL;
    if (!file)
        return err_set(e, E_INPUT, "'%s/" HF_INDEX "': tensor '%s': expected a file name", s->dir,
                       st_shown(shown, entry->string));
    if (!path_is_plain_name(file))
        return err_set(e, E_INPUT,
                       "'%s/" HF_INDEX "': file '%s' is not a plain name in this directory", s->dir,
                       st_shown(shown, file));
    if (!ends_with(file, ".safetensors"))
        return err_set(e, E_UNSUPPORTED, "'%s/" HF_INDEX "': file '%s' is not a safetensors file",
                       s->dir, file);
    TRY(path_join(path, sizeof path, s->dir, file, e));
    if (!file_exists(path))
        return err_set(e, E_INPUT, "'%s': shard '%s' is missing (" HF_INDEX " names it)", s->dir,
                       file);
    return OK;
}

static err_code list_from_index(hf_shards *s, const cJSON *map, const dir_list *files, err *e)
{
    const char *last = NULL;
    if (!cJSON_IsObject(map) || !map->child)
        return err_set(e, E_INPUT, "'%s/" HF_INDEX "': weight_map: expected an object with tensors",
                       s->dir);
    for (const cJSON *c = map->child; c; c = c->next) {
        if (last && cJSON_IsString(c) && strcmp(c->valuestring, last) == 0)
            continue; /* neighbours share a file */
        TRY(check_index_file(s, c, e));
        TRY(add_shard(s, c->valuestring, e));
        last = c->valuestring;
    }
    for (size_t i = 0; i < files->n; i++) {
        int part, parts, at = 0;
        const char *name = files->names[i];
        if (strcmp(name, "model.safetensors") != 0 && !part_of(name, &part, &parts)) continue;
        while (at < s->n && strcmp(s->shard[at].name, name) != 0) at++;
        if (at == s->n)
            return err_set(e, E_INPUT,
                           "'%s': '%s' is there but " HF_INDEX
                           " does not name it: left from another save?",
                           s->dir, name);
    }
    return OK;
}

/* Parts must be complete and of one set, since no index says so. */
static err_code check_parts(const hf_shards *s, err *e)
{
    int part, parts, all = 0;
    for (int i = 0; i < s->n; i++) {
        if (!part_of(s->shard[i].name, &part, &parts)) continue;
        if (all && parts != all)
            return err_set(e, E_INPUT, "'%s': shard '%s' is not one of %d parts as the others are",
                           s->dir, s->shard[i].name, all);
        all = parts;
    }
    for (int want = 1; want <= all; want++) {
        char name[64];
        int at = 0;
        (void)snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", want, all);
        while (at < s->n && strcmp(s->shard[at].name, name) != 0) at++;
        if (at == s->n) return err_set(e, E_INPUT, "'%s': shard '%s' is missing", s->dir, name);
    }
    return OK;
}

static err_code list_from_names(hf_shards *s, const dir_list *files, err *e)
{
    static const char *const others[] = {".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5"};
    for (int pass = 0; pass < 2 && s->n == 0; pass++)
        for (size_t i = 0; i < files->n; i++)
            if (ends_with(files->names[i], ".safetensors") &&
                (pass || strncmp(files->names[i], "model", 5) == 0))
                TRY(add_shard(s, files->names[i], e));
    if (s->n) return check_parts(s, e);
    for (size_t k = 0; k < sizeof others / sizeof others[0]; k++)
        for (size_t i = 0; i < files->n; i++)
            if (ends_with(files->names[i], others[k]))
                return err_set(
                    e, E_UNSUPPORTED,
                    "'%s/%s': weights in %s files are not read; convert them to safetensors",
                    s->dir, files->names[i], others[k]);
    for (size_t i = 0; i < files->n; i++)
        if (ends_with(files->names[i], ".bin.index.json"))
            return err_set(
                e, E_UNSUPPORTED,
                "'%s': '%s' speaks of .bin shards, which are not read; convert them to safetensors",
                s->dir, files->names[i]);
    return err_set(e, E_INPUT, "'%s' has no safetensors file", s->dir);
}

/* ---- one name space ---- */
static uint64_t slot_of(const hf_shards *s, const char *name)
{
    uint64_t i = XXH3_64bits(name, strlen(name)) & (s->table_size - 1);
    while (s->table[i].shard &&
           strcmp(st_at(s->shard[s->table[i].shard - 1].st, s->table[i].item).name, name) != 0)
        i = (i + 1) & (s->table_size - 1);
    return i;
}

static err_code build_table(hf_shards *s, err *e)
{
    char shown[ST_SHOWN];
    for (int i = 0; i < s->n; i++) s->count += st_count(s->shard[i].st);
    for (s->table_size = 16; s->table_size < (uint64_t)s->count * 2;) s->table_size *= 2;
    TRY(mem_alloc((void **)&s->table, (size_t)s->table_size, sizeof *s->table, "tensor names", e));
    for (int i = 0; i < s->n; i++) {
        for (int64_t j = 0; j < st_count(s->shard[i].st); j++) {
            const char *name = st_at(s->shard[i].st, j).name;
            hf_slot *slot = &s->table[slot_of(s, name)];
            if (slot->shard)
                return err_set(e, E_INPUT, "'%s': tensor '%s' is in '%s' and in '%s'", s->dir,
                               st_shown(shown, name), s->shard[slot->shard - 1].name,
                               s->shard[i].name);
            *slot = (hf_slot){i + 1, j};
        }
    }
    return OK;
}

static err_code check_index(const hf_shards *s, const cJSON *map, err *e)
{
    char shown[ST_SHOWN];
    for (const cJSON *c = map->child; c; c = c->next) {
        const hf_slot *slot = &s->table[slot_of(s, c->string)];
        if (!cJSON_IsString(c)) return check_index_file(s, c, e);
        if (!slot->shard)
            return err_set(e, E_INPUT,
                           "'%s/%s': tensor '%s' is missing (" HF_INDEX " puts it there)", s->dir,
                           c->valuestring, st_shown(shown, c->string));
        if (strcmp(s->shard[slot->shard - 1].name, c->valuestring) != 0)
            return err_set(e, E_INPUT, "'%s': tensor '%s' is in '%s', " HF_INDEX " says '%s'",
                           s->dir, st_shown(shown, c->string), s->shard[slot->shard - 1].name,
                           c->valuestring);
    }
    return OK;
}

static err_code open_listed(hf_shards *s, err *e)
{
    char path[4096];
    for (int i = 0; i < s->n; i++) {
        TRY(path_join(path, sizeof path, s->dir, s->shard[i].name, e));
        TRY(st_open(&s->shard[i].st, path, e));
    }
    return build_table(s, e);
}

static err_code open_with_index(hf_shards *s, const char *index, const dir_list *files, err *e)
{
    cJSON *o;
    err_code rc;
    TRY(json_load(&o, index, HF_MAX_INDEX, e));
    const cJSON *map = cJSON_GetObjectItemCaseSensitive(o, "weight_map");
    if ((rc = list_from_index(s, map, files, e)) != OK) goto done;
    if ((rc = open_listed(s, e)) != OK) goto done;
    rc = check_index(s, map, e);
done:
    cJSON_Delete(o);
    return rc;
}

err_code hf_shards_open(hf_shards **out, const char *dir, err *e)
{
    hf_shards *s;
    dir_list files = {0};
    char index[4096];
    err_code rc;
    *out = NULL;
    TRY(mem_alloc((void **)&s, 1, sizeof *s, dir, e));
    if ((rc = mem_strdup(&s->dir, dir, e)) != OK) goto done;
    if ((rc = mem_alloc((void **)&s->shard, HF_MAX_SHARDS, sizeof *s->shard, dir, e)) != OK)
        goto done;
    if ((rc = dir_list_open(&files, dir, e)) != OK) goto done;
    if ((rc = path_join(index, sizeof index, dir, HF_INDEX, e)) != OK) goto done;
    if (file_exists(index))
        rc = open_with_index(s, index, &files, e);
    else if ((rc = list_from_names(s, &files, e)) == OK)
        rc = open_listed(s, e);
    if (rc != OK) goto done;
    *out = s;
    s = NULL;
done:
    dir_list_free(&files);
    hf_shards_close(&s);
    return rc;
}

void hf_shards_close(hf_shards **s)
{
    hf_shards *v = *s;
    if (!v) return;
    for (int i = 0; i < v->n; i++) {
        st_close(&v->shard[i].st);
        mem_free(v->shard[i].name);
    }
    mem_free(v->table);
    mem_free(v->shard);
    mem_free(v->dir);
    mem_free(v);
    *s = NULL;
}

bool hf_shards_find(const hf_shards *s, const char *name, tensor *view, const char **file)
{
    const hf_slot *slot = &s->table[slot_of(s, name)];
    if (!slot->shard) return false;
    *view = st_at(s->shard[slot->shard - 1].st, slot->item).view;
    if (file) *file = s->shard[slot->shard - 1].name;
    return true;
}

void hf_shards_advise(const hf_shards *s, const char *name, bool need)
{
    const hf_slot *slot = &s->table[slot_of(s, name)];
    if (!slot->shard) return;
    const st_file *st = s->shard[slot->shard - 1].st;
    const tensor view = st_at(st, slot->item).view;
    st_advise(st, &view, need);
}

/* ---- digest ---- */
/* Piece k of four: the start, one and two thirds, the end. A small tensor is one piece. */
static tensor digest_piece(const tensor *t, int k, bool whole)
{
    const size_t n = tensor_bytes(t), piece = HF_DIGEST_PIECE;
    uint8_t *p = t->data;
    if (whole || n <= 4 * piece) return tensor_1d(p, DT_U8, k ? 0 : (int64_t)n);
    const size_t at = k == 3 ? n - piece : (n - piece) / 3 * (size_t)k;
    return tensor_1d(p + at, DT_U8, (int64_t)piece);
}

/* Asked for first, so that the reads of a cold file run side by side; then hashed. */
static void digest_pieces(const hf_shard *s, bool whole, hash_xxh *h)
{
    for (int64_t i = 0; i < st_count(s->st); i++) {
        const tensor view = st_at(s->st, i).view;
        for (int k = 0; k < 4; k++) {
            const tensor piece = digest_piece(&view, k, whole);
            if (h)
                hash_xxh_add(h, piece.data, tensor_bytes(&piece));
            else
                st_advise(s->st, &piece, true);
        }
    }
}

static err_code shard_digest(const hf_shard *s, bool whole, char *line, size_t cap, err *e)
{
    hash_xxh *h;
    size_t n;
    const void *head = st_head(s->st, &n);
    TRY(hash_xxh_open(&h, e));
    hash_xxh_add(h, head, n);
    digest_pieces(s, whole, h);
    const hash128 d = hash_xxh_end(&h);
    (void)snprintf(line, cap, "%s %llu %s\n", s->name, (unsigned long long)st_bytes(s->st), d.hex);
    return OK;
}

err_code hf_shards_digest(const hf_shards *s, const char *config, size_t n, hash256 *out, err *e)
{
    char *text;
    uint64_t bytes = 0;
    hash256 of_config;
    err_code rc = OK;
    enum { LINE = 256 + 64 }; /* a plain name, a size, a digest */
    for (int i = 0; i < s->n; i++) bytes += st_bytes(s->shard[i].st);
    const bool whole = bytes <= HF_DIGEST_WHOLE;
    for (int i = 0; i < s->n; i++) digest_pieces(&s->shard[i], whole, NULL);
    TRY(hash_sha256(&of_config, config, n, e));
    TRY(mem_alloc((void **)&text, (size_t)s->n + 1, LINE, "digest", e));
    size_t at = (size_t)snprintf(text, LINE, "config.json %s\n", of_config.hex);
    for (int i = 0; i < s->n && rc == OK; i++) {
        rc = shard_digest(&s->shard[i], whole, text + at, LINE, e);
        at += strlen(text + at);
    }
    if (rc == OK) rc = hash_sha256(out, text, at, e);
    mem_free(text);
    return rc;
}
