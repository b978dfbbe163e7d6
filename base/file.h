/* Read-only mappings, atomic writers, paths. Writers write beside the target, fsync, check close,
 * then rename: a killed run leaves nothing under the final name. */
#ifndef TMF_BASE_FILE_H
#define TMF_BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/err.h"

typedef struct {
    const uint8_t *data; /* NULL when size is 0 */
    size_t size;
} file_map;
/* Regular files only: a FIFO, device or directory is E_INPUT. E_IO when it cannot be opened. */
err_code file_map_open(file_map *m, const char *path, err *e);
void file_map_close(file_map *m);
/* Tells the kernel that the pages of [off, off+len) are needed soon / no longer needed. */
void file_map_willneed(const file_map *m, size_t off, size_t len);
void file_map_dontneed(const file_map *m, size_t off, size_t len);

/* Whole regular file of at most `max` bytes (else E_LIMIT), NUL-terminated; free with mem_free. */
err_code file_read(char **out, size_t *size, const char *path, size_t max, err *e);
bool file_exists(const char *path);
bool file_is_dir(const char *path);
err_code file_size(uint64_t *out, const char *path, err *e);

/* One output file. `final` is refused when it exists and `force` is false (E_USAGE "exists, use
 * --force"). file_writer_commit nulls *w; abort removes the temporary file and accepts NULL. */
typedef struct file_writer file_writer;
err_code file_writer_open(file_writer **w, const char *final, bool force, err *e);
err_code file_writer_write(file_writer *w, const void *data, size_t n, err *e);
err_code file_writer_pwrite(file_writer *w, const void *data, size_t n, uint64_t at, err *e);
err_code file_writer_commit(file_writer **w, err *e);
void file_writer_abort(file_writer **w);

/* One output directory: files are written under dir_writer_path(), a hidden directory beside the
 * target named from it, and appear together at commit. An empty target directory counts as absent.
 * With `force` an existing target is moved aside and removed after the rename. `keep` at open takes
 * over what a killed run left there (resume). */
typedef struct dir_writer dir_writer;
err_code dir_writer_open(dir_writer **w, const char *final, bool force, bool keep, err *e);
const char *dir_writer_path(const dir_writer *w);
err_code dir_writer_commit(dir_writer **w, err *e); /* fsyncs every file and directory first */
/* Abort removes the temporary directory; leave keeps it for a later run. Both accept NULL. */
void dir_writer_abort(dir_writer **w);
void dir_writer_leave(dir_writer **w);

/* Joins into buf; E_LIMIT when it does not fit. */
err_code path_join(char *buf, size_t cap, const char *dir, const char *name, err *e);
const char *path_base(const char *path);
/* A plain file name that stays inside its directory: no '/', not "." or "..", no control bytes. */
bool path_is_plain_name(const char *name);
err_code file_copy(const char *from, const char *to, err *e);
err_code dir_make(const char *path, err *e); /* and its parents; an existing one is fine */
err_code dir_remove_tree(const char *path, err *e);
/* Sorted plain names of the regular files in a directory. Free with dir_list_free. */
typedef struct {
    char **names;
    size_t n;
} dir_list;
err_code dir_list_open(dir_list *l, const char *path, err *e);
void dir_list_free(dir_list *l);

/* Advisory lock "<path>.lock" held until unlock or exit; E_IO naming the holder's pid when
 * taken. */
typedef struct {
    int fd;
    char path[4096];
} file_lock;
err_code file_lock_take(file_lock *l, const char *path, err *e);
void file_lock_drop(file_lock *l);

#endif
