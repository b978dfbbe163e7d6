/* Files: mappings, whole reads, paths, lists, locks. The writers are in file_writer.c. */
#include "base/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"

/* O_NONBLOCK: opening a FIFO must not wait for a writer before it is refused. */
static err_code file_open_regular(int *out, struct stat *st, const char *path, err *e)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return err_sys(e, E_IO, errno, "cannot open '%s'", path);
    if (fstat(fd, st) != 0) {
        const int errnum = errno;
        (void)close(fd);
        return err_sys(e, E_IO, errnum, "cannot read '%s'", path);
    }
    if (!S_ISREG(st->st_mode)) {
        (void)close(fd);
        return err_set(e, E_INPUT, "'%s' is %s, expected a regular file", path,
                       S_ISDIR(st->st_mode) ? "a directory" : "a special file");
    }
    *out = fd;
    return OK;
}

err_code file_map_open(file_map *m, const char *path, err *e)
{
    struct stat st;
    int fd;
    *m = (file_map){0};
    TRY(file_open_regular(&fd, &st, path, e));
    if (st.st_size > 0) {
        if ((uintmax_t)st.st_size > PTRDIFF_MAX) {
            (void)close(fd);
            return err_set(e, E_LIMIT, "'%s' is too large to map (%jd bytes)", path,
                           (intmax_t)st.st_size);
        }
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) {
            const int errnum = errno;
            (void)close(fd);
            return err_sys(e, E_IO, errnum, "cannot map '%s'", path);
        }
        *m = (file_map){p, (size_t)st.st_size};
    }
    (void)close(fd); /* the mapping stays; nothing was written through fd */
    return OK;
}

void file_map_close(file_map *m)
{
    if (m->size) (void)munmap((void *)(uintptr_t)m->data, m->size);
    *m = (file_map){0};
}

/* Whole pages that the range touches (need) or covers (drop). */
static void file_map_advise(const file_map *m, size_t off, size_t len, int advice)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (off >= m->size || len == 0) return;
    if (len > m->size - off) len = m->size - off;
    const size_t first = off / page * page;
    (void)madvise((void *)(uintptr_t)(m->data + first), off + len - first,
                  advice); /* advice only */
}

void file_map_willneed(const file_map *m, size_t off, size_t len)
{
    file_map_advise(m, off, len, MADV_WILLNEED);
}

void file_map_dontneed(const file_map *m, size_t off, size_t len)
{
    file_map_advise(m, off, len, MADV_DONTNEED);
}

/* Reads to the end, whatever size was seen before: the file may have grown or shrunk since. */
static err_code file_read_fd(int fd, char *buf, size_t cap, size_t *got, const char *path, err *e)
{
    size_t n = 0;
    while (n < cap) {
        const ssize_t r = read(fd, buf + n, cap - n);
        if (r < 0 && errno == EINTR) continue;
        if (r < 0) return err_sys(e, E_IO, errno, "cannot read '%s'", path);
        if (r == 0) break;
        n += (size_t)r;
    }
    *got = n;
    return OK;
}

err_code file_read(char **out, size_t *size, const char *path, size_t max, err *e)
{
    struct stat st;
    void *p = NULL;
    size_t got = 0;
    err_code rc;
    int fd;
    *out = NULL;
    *size = 0;
    TRY(file_open_regular(&fd, &st, path, e));
    if ((uintmax_t)st.st_size > max) {
        rc = err_set(e, E_LIMIT, "'%s': %jd bytes, expected at most %zu", path,
                     (intmax_t)st.st_size, max);
        goto done;
    }
    if ((rc = mem_alloc(&p, (size_t)st.st_size + 1, 1, path, e)) != OK) goto done;
    if ((rc = file_read_fd(fd, p, (size_t)st.st_size, &got, path, e)) != OK) goto done;
    if (got != (size_t)st.st_size) {
        rc = err_set(e, E_IO, "'%s' shrank while it was read", path);
        goto done;
    }
    *out = p;
    *size = got;
    p = NULL;
done:
    mem_free(p);
    (void)close(fd);
    return rc;
}

bool file_exists(const char *path) { return access(path, F_OK) == 0; }

bool file_is_dir(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

err_code file_size(uint64_t *out, const char *path, err *e)
{
    struct stat st;
    if (stat(path, &st) != 0) return err_sys(e, E_IO, errno, "cannot open '%s'", path);
    if (!S_ISREG(st.st_mode)) return err_set(e, E_INPUT, "'%s' is not a regular file", path);
    *out = (uint64_t)st.st_size;
    return OK;
}

err_code path_join(char *buf, size_t cap, const char *dir, const char *name, err *e)
{
    const size_t n = strlen(dir);
    const char *sep = n && dir[n - 1] != '/' ? "/" : "";
    const int w = snprintf(buf, cap, "%s%s%s", dir, sep, name);
    if (w < 0 || (size_t)w >= cap)
        return err_set(e, E_LIMIT, "path '%s/%s' is longer than %zu bytes", dir, name, cap - 1);
    return OK;
}

const char *path_base(const char *path)
{
    const char *s = strrchr(path, '/');
    return s ? s + 1 : path;
}

bool path_is_plain_name(const char *name)
{
    if (!*name || strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || strlen(name) > 255)
        return false;
    for (const unsigned char *s = (const unsigned char *)name; *s; s++)
        if (*s == '/' || *s < 0x20 || *s == 0x7f) return false;
    return true;
}

static err_code file_copy_data(file_writer *w, int fd, const char *from, err *e)
{
    void *buf;
    const size_t cap = (size_t)1 << 20;
    size_t got = cap;
    err_code rc = OK;
    TRY(mem_alloc(&buf, cap, 1, "copy buffer", e));
    while (rc == OK && got == cap) {
        rc = file_read_fd(fd, buf, cap, &got, from, e);
        if (rc == OK) rc = file_writer_write(w, buf, got, e);
    }
    mem_free(buf);
    return rc;
}

err_code file_copy(const char *from, const char *to, err *e)
{
    struct stat st;
    file_writer *w = NULL;
    err_code rc;
    int fd;
    TRY(file_open_regular(&fd, &st, from, e));
    if ((rc = file_writer_open(&w, to, true, e)) != OK) goto done;
    if ((rc = file_copy_data(w, fd, from, e)) != OK) goto done;
    rc = file_writer_commit(&w, e);
done:
    file_writer_abort(&w);
    (void)close(fd);
    return rc;
}

err_code dir_make(const char *path, err *e)
{
    char buf[4096];
    const size_t n = strlen(path);
    if (n == 0 || n >= sizeof buf)
        return err_set(e, E_IO, "cannot create directory '%s': bad length", path);
    memcpy(buf, path, n + 1);
    for (size_t i = 1; i <= n; i++) {
        if (buf[i] != '/' && buf[i] != '\0') continue;
        const char c = buf[i];
        buf[i] = '\0';
        if (mkdir(buf, 0777) != 0) {
            const int errnum = errno;
            if (!file_is_dir(buf))
                return err_sys(e, E_IO, errnum, "cannot create directory '%s'", buf);
        }
        buf[i] = c;
    }
    return OK;
}

static int dir_remove_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st, (void)type, (void)at;
    return remove(path);
}

err_code dir_remove_tree(const char *path, err *e)
{
    /* FTW_PHYS: links are removed, never followed; FTW_MOUNT: another file system is not ours. */
    if (nftw(path, dir_remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT) != 0 && errno != ENOENT)
        return err_sys(e, E_IO, errno, "cannot remove '%s'", path);
    return OK;
}

static int dir_list_compare(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static err_code dir_list_add(dir_list *l, size_t *cap, const char *name, err *e)
{
    if (l->n == *cap) {
        void *p;
        const size_t more = *cap ? *cap * 2 : 16;
        TRY(mem_alloc(&p, more, sizeof(char *), "directory listing", e));
        if (l->n) memcpy(p, l->names, l->n * sizeof(char *));
        mem_free(l->names);
        l->names = p;
        *cap = more;
    }
    TRY(mem_strdup(&l->names[l->n], name, e));
    l->n++;
    return OK;
}

err_code dir_list_open(dir_list *l, const char *path, err *e)
{
    size_t cap = 0;
    err_code rc = OK;
    *l = (dir_list){0};
    DIR *d = opendir(path);
    if (!d) return err_sys(e, E_IO, errno, "cannot open directory '%s'", path);
    for (;;) {
        struct stat st;
        errno = 0;
        const struct dirent *ent = readdir(d);
        if (!ent) {
            if (errno) rc = err_sys(e, E_IO, errno, "cannot read directory '%s'", path);
            break;
        }
        /* Links are followed: hub caches keep their files behind links. */
        if (fstatat(dirfd(d), ent->d_name, &st, 0) != 0 || !S_ISREG(st.st_mode)) continue;
        if ((rc = dir_list_add(l, &cap, ent->d_name, e)) != OK) break;
    }
    (void)closedir(d);
    if (rc != OK)
        dir_list_free(l);
    else if (l->n)
        qsort(l->names, l->n, sizeof l->names[0], dir_list_compare);
    return rc;
}

void dir_list_free(dir_list *l)
{
    for (size_t i = 0; i < l->n; i++) mem_free(l->names[i]);
    mem_free(l->names);
    *l = (dir_list){0};
}

static err_code file_lock_busy(int fd, const char *path, err *e)
{
    char pid[32];
    const ssize_t n = pread(fd, pid, sizeof pid - 1, 0);
    pid[n > 0 ? n : 0] = '\0';
    pid[strcspn(pid, "\n")] = '\0';
    return err_set(e, E_IO, "'%s' is in use by process %s", path, *pid ? pid : "(unknown)");
}

/* One attempt. *gone is set when the holder removed the file between our open and our lock. */
static err_code file_lock_try(file_lock *l, const char *path, bool *gone, err *e)
{
    struct stat mine, there;
    *gone = false;
    const int fd = open(l->path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fd < 0) return err_sys(e, E_IO, errno, "cannot create '%s'", l->path);
    err_code rc = OK;
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        rc = errno == EWOULDBLOCK ? file_lock_busy(fd, path, e)
                                  : err_sys(e, E_IO, errno, "cannot lock '%s'", l->path);
    } else if (fstat(fd, &mine) != 0 || stat(l->path, &there) != 0 || mine.st_ino != there.st_ino) {
        *gone = true;
    } else {
        char pid[32];
        const int n = snprintf(pid, sizeof pid, "%ld\n", (long)getpid());
        if (ftruncate(fd, 0) != 0 || pwrite(fd, pid, (size_t)n, 0) != n)
            rc = err_sys(e, E_IO, errno, "cannot write '%s'", l->path);
    }
    if (rc != OK || *gone)
        (void)close(fd);
    else
        l->fd = fd;
    return rc;
}

err_code file_lock_take(file_lock *l, const char *path, err *e)
{
    bool gone = true;
    l->fd = -1;
    const int n = snprintf(l->path, sizeof l->path, "%s.lock", path);
    if (n < 0 || (size_t)n >= sizeof l->path)
        return err_set(e, E_IO, "path '%s' is too long", path);
    while (gone) TRY(file_lock_try(l, path, &gone, e));
    return OK;
}

void file_lock_drop(file_lock *l)
{
    if (l->fd < 0) return;
    (void)unlink(l->path); /* while still held: a waiter sees another inode and tries again */
    (void)close(l->fd);
    l->fd = -1;
}
