/* Each layer pulls from the one below and knows its first bytes before it is read, which is how
 * the next layer is chosen: file -> [zstd | gzip, xz, bzip2] -> [tar] -> [zstd | gzip, xz,
 * bzip2] -> bytes. */
#include "datasets/source.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>
#include <zstd_errors.h>

#include "base/file.h"
#include "base/mem.h"

#define PEEK_BYTES  1024
#define BLOCK_BYTES ((size_t)128 << 10)

typedef enum { LAYER_FILE, LAYER_ZSTD, LAYER_PACKED, LAYER_TAR } layer_kind;

typedef struct layer {
    layer_kind kind;
    struct layer *below;
    const source *s;
    int fd;
    ZSTD_DStream *zstd;
    struct archive *archive;
    uint8_t *block; /* [BLOCK_BYTES] input of zstd and of libarchive */
    size_t block_n, block_at;
    bool frame_open, ended;
    err_code below_rc; /* what the layer below said inside a libarchive callback */
    err below_err;
    uint8_t peek[PEEK_BYTES];
    size_t peek_n, peek_at;
} layer;

struct source {
    char path[4096], where[8192], name[4096];
    const job *j;
    layer *file, *unpacked, *tar, *entry; /* entry: unpacks one file of the archive */
    layer *top;                           /* what source_read reads */
    bool done;
    int entries;
    uint64_t bytes_in, bytes_out;
};

static err_code layer_read(layer *l, void *buf, size_t cap, size_t *n, err *e);

/* ---- file ---- */

static err_code file_pull(layer *l, void *buf, size_t cap, size_t *n, err *e)
{
    ssize_t got;
    do got = read(l->fd, buf, cap);
    while (got < 0 && errno == EINTR);
    if (got < 0) return err_sys(e, E_IO, errno, "%s: cannot read", l->s->path);
    *n = (size_t)got;
    ((source *)l->s)->bytes_in += (uint64_t)got;
    return OK;
}

/* ---- zstd ---- */

static err_code zstd_pull(layer *l, void *buf, size_t cap, size_t *n, err *e)
{
    ZSTD_outBuffer out = {buf, cap, 0};
    while (out.pos == 0 && !l->ended) {
        if (l->block_at == l->block_n) {
            TRY(layer_read(l->below, l->block, BLOCK_BYTES, &l->block_n, e));
            l->block_at = 0;
            l->ended = l->block_n == 0;
            if (l->ended && l->frame_open)
                return err_set(e, E_INPUT, "%s: corrupt zstd: cut short", l->s->where);
            if (l->ended) break;
        }
        ZSTD_inBuffer in = {l->block, l->block_n, l->block_at};
        const size_t rc = ZSTD_decompressStream(l->zstd, &out, &in);
        if (ZSTD_isError(rc))
            return err_set(e,
                           ZSTD_getErrorCode(rc) == ZSTD_error_frameParameter_windowTooLarge
                               ? E_LIMIT
                               : E_INPUT,
                           "%s: corrupt zstd: %s", l->s->where, ZSTD_getErrorName(rc));
        l->block_at = in.pos;
        l->frame_open = rc != 0;
    }
    *n = out.pos;
    return OK;
}

/* ---- libarchive: one filter, or tar ---- */

static la_ssize_t archive_pull_below(struct archive *a, void *ctx, const void **data)
{
    layer *l = ctx;
    size_t n;
    l->below_rc = layer_read(l->below, l->block, BLOCK_BYTES, &n, &l->below_err);
    if (l->below_rc != OK) {
        archive_set_error(a, EIO, "%s", "read failed");
        return -1;
    }
    *data = l->block;
    return (la_ssize_t)n;
}

static err_code archive_failed(layer *l, err *e)
{
    if (l->below_rc != OK) {
        *e = l->below_err;
        return l->below_rc;
    }
    const char *why = archive_error_string(l->archive);
    if (archive_errno(l->archive) == ENOMEM)
        return err_set(e, E_NOMEM, "%s: out of memory", l->s->where);
    return err_set(e, E_INPUT, "%s: corrupt %s: %s", l->s->where,
                   l->kind == LAYER_TAR ? "archive" : "compressed data",
                   why ? why : "unknown fault");
}

static err_code archive_start(layer *l, err *e)
{
    struct archive_entry *entry;
    l->archive = archive_read_new();
    if (!l->archive) return err_set(e, E_NOMEM, "%s: out of memory", l->s->where);
    if (l->kind == LAYER_TAR) {
        archive_read_support_format_tar(l->archive);
    } else {
        archive_read_support_filter_gzip(l->archive);
        archive_read_support_filter_xz(l->archive);
        archive_read_support_filter_bzip2(l->archive);
        archive_read_support_format_raw(l->archive);
    }
    if (archive_read_open(l->archive, l, NULL, archive_pull_below, NULL) != ARCHIVE_OK)
        return archive_failed(l, e);
    if (l->kind == LAYER_TAR) return OK;
    const int rc = archive_read_next_header(l->archive, &entry);
    l->ended = rc == ARCHIVE_EOF; /* nothing inside */
    return rc == ARCHIVE_OK || l->ended ? OK : archive_failed(l, e);
}

static err_code archive_pull(layer *l, void *buf, size_t cap, size_t *n, err *e)
{
    *n = 0;
    if (l->ended) return OK;
    const la_ssize_t got = archive_read_data(l->archive, buf, cap);
    if (got < 0) return archive_failed(l, e);
    *n = (size_t)got;
    return OK;
}

/* ---- layers ---- */

static err_code layer_pull(layer *l, void *buf, size_t cap, size_t *n, err *e)
{
    switch (l->kind) {
    case LAYER_FILE: return file_pull(l, buf, cap, n, e);
    case LAYER_ZSTD: return zstd_pull(l, buf, cap, n, e);
    default: return archive_pull(l, buf, cap, n, e);
    }
}

static err_code layer_read(layer *l, void *buf, size_t cap, size_t *n, err *e)
{
    if (l->peek_at == l->peek_n) return layer_pull(l, buf, cap, n, e);
    *n = l->peek_n - l->peek_at < cap ? l->peek_n - l->peek_at : cap;
    memcpy(buf, l->peek + l->peek_at, *n);
    l->peek_at += *n;
    return OK;
}

static err_code layer_peek(layer *l, err *e)
{
    l->peek_n = l->peek_at = 0;
    for (size_t got = 1; got && l->peek_n < PEEK_BYTES; l->peek_n += got)
        TRY(layer_pull(l, l->peek + l->peek_n, PEEK_BYTES - l->peek_n, &got, e));
    return OK;
}

static void layer_close(layer **l)
{
    if (!*l) return;
    if ((*l)->archive) archive_read_free((*l)->archive);
    if ((*l)->zstd) ZSTD_freeDStream((*l)->zstd);
    if ((*l)->fd >= 0) (void)close((*l)->fd);
    mem_free((*l)->block);
    mem_free(*l);
    *l = NULL;
}

static err_code layer_open(layer **out, source *s, layer_kind kind, layer *below, err *e)
{
    err_code rc;
    TRY(mem_alloc((void **)out, 1, sizeof **out, "reading data", e));
    layer *l = *out;
    l->kind = kind;
    l->below = below;
    l->s = s;
    l->fd = -1;
    if ((rc = mem_alloc((void **)&l->block, BLOCK_BYTES, 1, "reading data", e)) != OK) goto failed;
    if (kind == LAYER_ZSTD) {
        l->zstd = ZSTD_createDStream();
        rc = l->zstd ? OK : err_set(e, E_NOMEM, "%s: out of memory", s->where);
    } else {
        rc = archive_start(l, e);
    }
    if (rc == OK && kind != LAYER_TAR) rc = layer_peek(l, e);
    if (rc == OK) return OK;
failed:
    layer_close(out);
    return rc;
}

static bool starts(const layer *l, const char *magic, size_t n)
{
    return l->peek_n >= n && memcmp(l->peek, magic, n) == 0;
}

static bool is_zstd(const layer *l)
{
    const bool skippable = l->peek_n >= 4 && (l->peek[0] & 0xf0) == 0x50 &&
                           memcmp(l->peek + 1, "\x2a\x4d\x18", 3) == 0;
    return skippable || starts(l, "\x28\xb5\x2f\xfd", 4);
}

static bool is_packed(const layer *l)
{
    return starts(l, "\x1f\x8b", 2) ||
           starts(l,
                  "\xfd"
                  "7zXZ\0",
                  6) ||
           starts(l, "BZh", 3);
}

static bool ends_with(const char *s, const char *tail)
{
    const size_t n = strlen(s), k = strlen(tail);
    return n >= k && strcmp(s + n - k, tail) == 0;
}

static bool is_tar(const layer *l, const char *name)
{
    return ends_with(name, ".tar") || (l->peek_n >= 262 && memcmp(l->peek + 257, "ustar", 5) == 0);
}

/* Takes the ending of a compression off: "x.jsonl.zst" is "x.jsonl", "x.tgz" is "x.tar". */
static void strip_ending(char *name)
{
    static const char *const packed[] = {".zst", ".gz", ".xz", ".bz2"};
    const size_t n = strlen(name);
    for (size_t i = 0; i < 4; i++)
        if (ends_with(name, packed[i])) name[n - strlen(packed[i])] = '\0';
    if (n > 4 && ends_with(name, ".tgz")) memcpy(name + n - 4, ".tar", 5);
}

/* The layer that unpacks `l`, or NULL when it is not packed. */
static err_code unpack(layer **out, source *s, layer *l, err *e)
{
    *out = NULL;
    if (is_zstd(l)) return layer_open(out, s, LAYER_ZSTD, l, e);
    if (is_packed(l)) return layer_open(out, s, LAYER_PACKED, l, e);
    return OK;
}

static err_code refuse_kinds(const source *s, const layer *l, err *e)
{
    if (starts(l, "PAR1", 4))
        return err_set(e, E_UNSUPPORTED, "%s: a parquet file (write its text column out as jsonl)",
                       s->where);
    if (starts(l, "PK\x03\x04", 4))
        return err_set(e, E_UNSUPPORTED, "%s: a zip file (tar, zstd, gzip and xz are read)",
                       s->where);
    return OK;
}

/* ---- public ---- */

static err_code open_file(source *s, err *e)
{
    struct stat st;
    TRY(mem_alloc((void **)&s->file, 1, sizeof *s->file, "reading data", e));
    layer *l = s->file;
    l->s = s;
    l->fd = open(s->path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (l->fd < 0) return err_sys(e, E_IO, errno, "cannot open '%s'", s->path);
    if (fstat(l->fd, &st) != 0) return err_sys(e, E_IO, errno, "%s: cannot stat", s->path);
    if (!S_ISREG(st.st_mode)) return err_set(e, E_INPUT, "%s: expected a regular file", s->path);
    return layer_peek(l, e);
}

static err_code open_layers(source *s, err *e)
{
    TRY(open_file(s, e));
    snprintf(s->name, sizeof s->name, "%s", path_base(s->path));
    TRY(unpack(&s->unpacked, s, s->file, e));
    s->top = s->unpacked ? s->unpacked : s->file;
    strip_ending(s->name);
    TRY(refuse_kinds(s, s->top, e));
    if (is_tar(s->top, s->name)) TRY(layer_open(&s->tar, s, LAYER_TAR, s->top, e));
    return OK;
}

err_code source_open(source **out, const char *path, const job *j, err *e)
{
    *out = NULL;
    source *s;
    if (strlen(path) >= sizeof s->path)
        return err_set(e, E_INPUT, "path is too long: '%.60s...'", path);
    TRY(mem_alloc((void **)&s, 1, sizeof *s, "reading data", e));
    strcpy(s->path, path);
    strcpy(s->where, path);
    s->j = j;
    const err_code rc = open_layers(s, e);
    if (rc != OK) source_close(&s);
    *out = s;
    return rc;
}

void source_close(source **s)
{
    if (!*s) return;
    layer_close(&(*s)->entry);
    layer_close(&(*s)->tar);
    layer_close(&(*s)->unpacked);
    layer_close(&(*s)->file);
    mem_free(*s);
    *s = NULL;
}

/* Nothing is extracted, but an archive that tries to write elsewhere is not one to trust with
 * content. */
static err_code check_name(const source *s, const char *name, err *e)
{
    bool leaves = name[0] == '/' || name[0] == '\\' || (name[0] && name[1] == ':');
    for (const char *p = name; *p && !leaves; p++) {
        const bool begin = p == name || p[-1] == '/' || p[-1] == '\\';
        leaves = begin && p[0] == '.' && p[1] == '.' &&
                 (p[2] == '/' || p[2] == '\\' || p[2] == '\0');
    }
    return leaves ? err_set(e, E_INPUT, "%s: entry '%.200s': expected a name inside the archive",
                            s->path, name)
                  : OK;
}

/* Whether the entry at hand is one to read. */
static bool entry_wanted(const source *s, struct archive_entry *entry, const char *name)
{
    const char *base = path_base(name);
    if (archive_entry_filetype(entry) != AE_IFREG || archive_entry_hardlink(entry) ||
        archive_entry_sparse_count(entry) > 0) {
        if (archive_entry_filetype(entry) != AE_IFDIR)
            job_log(s->j, LOG_INFO, "%s: entry '%s' is not a plain file: skipped", s->path, name);
        return false;
    }
    return base[0] != '.' && strncmp(name, "__MACOSX/", 9) != 0;
}

static err_code next_entry(source *s, bool *more, err *e)
{
    struct archive_entry *entry;
    for (;;) {
        const int rc = archive_read_next_header(s->tar->archive, &entry);
        *more = rc != ARCHIVE_EOF;
        if (!*more) return OK;
        if (rc != ARCHIVE_OK && rc != ARCHIVE_WARN) return archive_failed(s->tar, e);
        if (++s->entries > SOURCE_MAX_ENTRIES)
            return err_set(e, E_LIMIT, "%s: more than %d entries", s->path, SOURCE_MAX_ENTRIES);
        const char *name = archive_entry_pathname(entry);
        if (!name) name = archive_entry_pathname_utf8(entry);
        if (!name)
            return err_set(e, E_INPUT, "%s: entry %d: its name is not readable", s->path,
                           s->entries);
        TRY(check_name(s, name, e));
        TRY(job_check(s->j, e));
        if (!entry_wanted(s, entry, name)) continue;
        snprintf(s->name, sizeof s->name, "%s", name);
        snprintf(s->where, sizeof s->where, "%s: %s", s->path, name);
        return OK;
    }
}

err_code source_next(source *s, const char **name, err *e)
{
    *name = NULL;
    if (s->done) return OK;
    if (!s->tar) {
        s->done = true;
        *name = s->name;
        return OK;
    }
    bool more;
    layer_close(&s->entry);
    TRY(next_entry(s, &more, e));
    s->done = !more;
    if (!more) return OK;
    TRY(layer_peek(s->tar, e));
    TRY(unpack(&s->entry, s, s->tar, e));
    s->top = s->entry ? s->entry : s->tar;
    if (s->entry) strip_ending(s->name);
    TRY(refuse_kinds(s, s->top, e));
    if (is_tar(s->top, s->name))
        return err_set(e, E_UNSUPPORTED, "%s: an archive inside an archive", s->where);
    *name = s->name;
    return OK;
}

err_code source_read(source *s, void *buf, size_t cap, size_t *n, err *e)
{
    TRY(layer_read(s->top, buf, cap, n, e));
    s->bytes_out += *n;
    if (s->bytes_out > SOURCE_FREE_BYTES && s->bytes_out / SOURCE_MAX_RATIO > s->bytes_in)
        return err_set(e, E_LIMIT, "%s: unpacks to more than %d times its size", s->where,
                       SOURCE_MAX_RATIO);
    return OK;
}

const char *source_where(const source *s) { return s->where; }
