/* Atomic outputs. The temporary name is fixed (".NAME.tmp" beside the target), so that a killed run
 * leaves at most one piece of litter, which the next run takes over; a lock on it keeps two runs
 * apart, and the kernel drops that lock however a process ends. */
#include "base/file.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"

#define WRITER_BUF ((size_t)64 << 10)

struct file_writer {
    int fd;
    bool force;
    uint64_t pos; /* where the next sequential byte goes, buffered ones included */
    size_t fill;
    char final[4096], temp[4096];
    uint8_t buf[WRITER_BUF];
};

struct dir_writer {
    int fd; /* of the temporary directory: holds the lock */
    bool force;
    char final[4096], temp[4096], old[4096];
};

/* "<dir>/.<base><suffix>"; `final` must be free of trailing slashes. */
static err_code writer_name(char *out, size_t cap, const char *final, const char *suffix, err *e)
{
    const char *base = path_base(final);
    const int n = snprintf(out, cap, "%.*s.%s%s", (int)(base - final), final, base, suffix);
    if (n < 0 || (size_t)n >= cap || strlen(base) > 240)
        return err_set(e, E_USAGE, "output '%s': the name is too long", final);
    return OK;
}

static err_code writer_target(char *final, size_t cap, const char *path, err *e)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    if (n >= cap) return err_set(e, E_USAGE, "output '%s': the name is too long", path);
    memcpy(final, path, n);
    final[n] = '\0';
    const char *base = path_base(final);
    if (!*base || strcmp(base, ".") == 0 || strcmp(base, "..") == 0)
        return err_set(e, E_USAGE, "output '%s' does not name a file or directory", path);
    return OK;
}

/* Makes the new name durable. File systems that cannot sync a directory say EINVAL: nothing to do
 * there. */
static err_code writer_sync_parent(const char *final, err *e)
{
    char dir[4096];
    const char *base = path_base(final);
    const int n = base == final ? snprintf(dir, sizeof dir, ".")
                                : snprintf(dir, sizeof dir, "%.*s", (int)(base - final), final);
    const int fd = n < 0 ? -1 : open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return err_sys(e, E_IO, errno, "cannot write '%s' (opening its directory)", final);
    const int rc = fsync(fd), errnum = errno;
    (void)close(fd);
    if (rc != 0 && errnum != EINVAL && errnum != EROFS)
        return err_sys(e, E_IO, errnum, "cannot write '%s' (syncing its directory)", final);
    return OK;
}

/* rename that refuses to replace, where the file system can say so. */
static int writer_rename(const char *from, const char *to, bool replace)
{
    if (!replace) {
        if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) return 0;
        if (errno != EINVAL && errno != ENOSYS) return -1;
    }
    return rename(from, to);
}

/* Locks fd, which was opened under `temp`. *stale: another run finished or removed it meanwhile. */
static err_code writer_lock(int fd, const char *temp, const char *final, bool *stale, err *e)
{
    struct stat mine, there;
    *stale = false;
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        if (errno == EWOULDBLOCK)
            return err_set(e, E_IO, "'%s' is being written by another process", final);
        if (errno != ENOLCK && errno != EOPNOTSUPP && errno != ENOSYS)
            return err_sys(e, E_IO, errno, "cannot lock '%s'", temp);
    }
    *stale = fstat(fd, &mine) != 0 || lstat(temp, &there) != 0 || mine.st_ino != there.st_ino ||
             mine.st_dev != there.st_dev;
    return OK;
}

static err_code file_writer_check(const char *final, bool force, err *e)
{
    struct stat st;
    if (lstat(final, &st) != 0) return OK; /* absent, or open() will say what is wrong */
    if (S_ISDIR(st.st_mode)) return err_set(e, E_USAGE, "output '%s' is a directory", final);
    if (!S_ISREG(st.st_mode) && !S_ISLNK(st.st_mode))
        return err_set(e, E_USAGE, "output '%s' is a special file, expected a regular one", final);
    if (!force) return err_set(e, E_USAGE, "output '%s' exists, use --force to replace it", final);
    return OK;
}

static err_code file_writer_create(file_writer *w, err *e)
{
    for (;;) {
        bool stale;
        w->fd = open(w->temp, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
        if (w->fd < 0) return err_sys(e, E_IO, errno, "cannot create '%s'", w->final);
        err_code rc = writer_lock(w->fd, w->temp, w->final, &stale, e);
        if (rc == OK && !stale) {
            if (ftruncate(w->fd, 0) == 0) return OK;
            rc = err_sys(e, E_IO, errno, "cannot write '%s'", w->final);
            (void)unlink(w->temp);
        }
        (void)close(w->fd);
        w->fd = -1;
        if (rc != OK) return rc;
    }
}

err_code file_writer_open(file_writer **out, const char *final, bool force, err *e)
{
    void *p;
    err_code rc;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(file_writer), "file writer", e));
    file_writer *w = p;
    w->fd = -1;
    w->force = force;
    if ((rc = writer_target(w->final, sizeof w->final, final, e)) != OK) goto fail;
    if ((rc = file_writer_check(w->final, force, e)) != OK) goto fail;
    if ((rc = writer_name(w->temp, sizeof w->temp, w->final, ".tmp", e)) != OK) goto fail;
    if ((rc = file_writer_create(w, e)) != OK) goto fail;
    *out = w;
    return OK;
fail:
    mem_free(w);
    return rc;
}

static err_code writer_put(file_writer *w, const void *data, size_t n, uint64_t at, err *e)
{
    const uint8_t *s = data;
    if (at > INT64_MAX || n > INT64_MAX - at)
        return err_set(e, E_LIMIT, "'%s' grows too large", w->final);
    while (n) {
        const ssize_t r = pwrite(w->fd, s, n, (off_t)at);
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) return err_sys(e, E_IO, r < 0 ? errno : ENOSPC, "cannot write '%s'", w->final);
        s += r;
        n -= (size_t)r;
        at += (uint64_t)r;
    }
    return OK;
}

static err_code writer_flush(file_writer *w, err *e)
{
    const size_t n = w->fill;
    w->fill = 0;
    return n ? writer_put(w, w->buf, n, w->pos - n, e) : OK;
}

err_code file_writer_write(file_writer *w, const void *data, size_t n, err *e)
{
    if (n > WRITER_BUF - w->fill) TRY(writer_flush(w, e));
    if (n >= WRITER_BUF) {
        TRY(writer_put(w, data, n, w->pos, e));
    } else if (n) {
        memcpy(w->buf + w->fill, data, n);
        w->fill += n;
    }
    w->pos += n;
    return OK;
}

err_code file_writer_pwrite(file_writer *w, const void *data, size_t n, uint64_t at, err *e)
{
    TRY(writer_flush(w, e)); /* keeps the order of overlapping writes */
    return writer_put(w, data, n, at, e);
}

static err_code file_writer_finish(file_writer *w, err *e)
{
    TRY(writer_flush(w, e));
    if (fsync(w->fd) != 0) return err_sys(e, E_IO, errno, "cannot write '%s'", w->final);
    /* Renamed before close: closing first would drop the lock while the temporary name is still
     * ours. */
    if (writer_rename(w->temp, w->final, w->force) != 0) {
        if (errno == EEXIST)
            return err_set(e, E_USAGE, "output '%s' exists, use --force to replace it", w->final);
        return err_sys(e, E_IO, errno, "cannot write '%s'", w->final);
    }
    w->temp[0] = '\0';
    const int rc = close(w->fd);
    w->fd = -1;
    if (rc != 0) return err_sys(e, E_IO, errno, "cannot write '%s'", w->final);
    return writer_sync_parent(w->final, e);
}

err_code file_writer_commit(file_writer **w, err *e)
{
    const err_code rc = file_writer_finish(*w, e);
    file_writer_abort(w);
    return rc;
}

void file_writer_abort(file_writer **w)
{
    if (!*w) return;
    if ((*w)->temp[0]) (void)unlink((*w)->temp);
    if ((*w)->fd >= 0) (void)close((*w)->fd);
    mem_free(*w);
    *w = NULL;
}

/* An empty directory in the way is no result: it may be replaced without being asked. */
static err_code dir_writer_check(const char *final, bool force, err *e)
{
    struct stat st;
    if (lstat(final, &st) != 0) return OK;
    if (!S_ISDIR(st.st_mode)) return err_set(e, E_USAGE, "output '%s' is not a directory", final);
    if (!force && rmdir(final) != 0)
        return err_set(e, E_USAGE, "output '%s' exists, use --force to replace it", final);
    return OK;
}

static err_code dir_writer_create(dir_writer *w, err *e)
{
    for (;;) {
        bool stale;
        if (mkdir(w->temp, 0777) != 0 && errno != EEXIST)
            return err_sys(e, E_IO, errno, "cannot create '%s'", w->final);
        w->fd = open(w->temp, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
        if (w->fd < 0 && errno == ENOENT) continue; /* another run finished between the two calls */
        if (w->fd < 0) return err_sys(e, E_IO, errno, "cannot create '%s'", w->final);
        const err_code rc = writer_lock(w->fd, w->temp, w->final, &stale, e);
        if (rc == OK && !stale) return OK;
        (void)close(w->fd);
        w->fd = -1;
        if (rc != OK) return rc;
    }
}

/* Empties the directory while its lock stays ours. */
static int dir_writer_wipe(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st, (void)type;
    return at->level == 0 ? 0 : remove(path);
}

err_code dir_writer_open(dir_writer **out, const char *final, bool force, bool keep, err *e)
{
    void *p;
    err_code rc;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(dir_writer), "directory writer", e));
    dir_writer *w = p;
    w->fd = -1;
    w->force = force;
    if ((rc = writer_target(w->final, sizeof w->final, final, e)) != OK) goto fail;
    if ((rc = dir_writer_check(w->final, force, e)) != OK) goto fail;
    if ((rc = writer_name(w->temp, sizeof w->temp, w->final, ".tmp", e)) != OK) goto fail;
    if ((rc = writer_name(w->old, sizeof w->old, w->final, ".old", e)) != OK) goto fail;
    if ((rc = dir_writer_create(w, e)) != OK) goto fail;
    if (!keep && nftw(w->temp, dir_writer_wipe, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT) != 0) {
        rc = err_sys(e, E_IO, errno, "cannot empty '%s'", w->temp);
        goto fail;
    }
    *out = w;
    return OK;
fail:
    if (w->fd >= 0) (void)close(w->fd);
    mem_free(w);
    return rc;
}

const char *dir_writer_path(const dir_writer *w) { return w->temp; }

/* nftw callback: 0 goes on; an errno value stops the walk. */
static int dir_writer_sync_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)at;
    if (type == FTW_NS || type == FTW_DNR) return EACCES;
    if (!S_ISREG(st->st_mode) && !S_ISDIR(st->st_mode)) return 0;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) return errno;
    const int rc = fsync(fd) != 0 && errno != EINVAL ? errno : 0;
    (void)close(fd);
    return rc;
}

/* Swaps in one step where the file system can; otherwise the target is absent for an instant. */
static err_code dir_writer_place(dir_writer *w, err *e)
{
    if (!w->force || !file_exists(w->final)) {
        if (writer_rename(w->temp, w->final, false) != 0)
            return errno == EEXIST || errno == ENOTEMPTY
                       ? err_set(e, E_USAGE, "output '%s' exists, use --force to replace it",
                                 w->final)
                       : err_sys(e, E_IO, errno, "cannot write '%s'", w->final);
        return OK;
    }
    TRY(dir_remove_tree(w->old, e));
    if (renameat2(AT_FDCWD, w->temp, AT_FDCWD, w->final, RENAME_EXCHANGE) == 0) {
        if (rename(w->temp, w->old) != 0)
            return err_sys(e, E_IO, errno, "cannot move '%s' aside", w->temp);
        return OK;
    }
    if (rename(w->final, w->old) != 0)
        return err_sys(e, E_IO, errno, "cannot move '%s' aside", w->final);
    if (rename(w->temp, w->final) != 0) {
        const int errnum = errno;
        (void)rename(w->old, w->final);
        return err_sys(e, E_IO, errnum, "cannot write '%s'", w->final);
    }
    return OK;
}

static err_code dir_writer_finish(dir_writer *w, err *e)
{
    const int rc = nftw(w->temp, dir_writer_sync_one, 16, FTW_DEPTH | FTW_PHYS);
    if (rc != 0) return err_sys(e, E_IO, rc > 0 ? rc : errno, "cannot write '%s'", w->final);
    TRY(dir_writer_place(w, e));
    w->temp[0] = '\0';
    TRY(writer_sync_parent(w->final, e));
    return dir_remove_tree(w->old, e);
}

err_code dir_writer_commit(dir_writer **w, err *e)
{
    const err_code rc = dir_writer_finish(*w, e);
    dir_writer_abort(w);
    return rc;
}

void dir_writer_abort(dir_writer **w)
{
    err ignored;
    if (!*w) return;
    if ((*w)->temp[0]) (void)dir_remove_tree((*w)->temp, &ignored);
    dir_writer_leave(w);
}

void dir_writer_leave(dir_writer **w)
{
    if (!*w) return;
    if ((*w)->fd >= 0) (void)close((*w)->fd);
    mem_free(*w);
    *w = NULL;
}
