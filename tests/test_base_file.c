/* base/file: atomic outputs under kill, full disks and failing system calls; maps, paths, locks.
 * The linker wraps the calls that write (tests/CMakeLists.txt), so that each can fail at its k-th
 * use. */
#include "base/file.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/mem.h"
#include "support/suite.h"
#include "support/tempdir.h"

static int calls, fail_at = -1; /* wrapped calls so far; the one that fails, -1 none */

static bool fails(void) { return calls++ == fail_at; }

ssize_t __real_pwrite(int fd, const void *p, size_t n, off_t at);
int __real_fsync(int fd);
int __real_ftruncate(int fd, off_t n);
int __real_renameat2(int a, const char *from, int b, const char *to, unsigned flags);
ssize_t __wrap_pwrite(int fd, const void *p, size_t n, off_t at);
int __wrap_fsync(int fd);
int __wrap_ftruncate(int fd, off_t n);
int __wrap_renameat2(int a, const char *from, int b, const char *to, unsigned flags);

ssize_t __wrap_pwrite(int fd, const void *p, size_t n, off_t at)
{
    if (fails()) {
        errno = ENOSPC;
        return -1;
    }
    /* Short writes are allowed and must be continued. */
    return __real_pwrite(fd, p, n > 1000 ? n / 2 : n, at);
}
int __wrap_fsync(int fd)
{
    if (!fails()) return __real_fsync(fd);
    errno = EIO;
    return -1;
}
int __wrap_ftruncate(int fd, off_t n)
{
    if (!fails()) return __real_ftruncate(fd, n);
    errno = EIO;
    return -1;
}
int __wrap_renameat2(int a, const char *from, int b, const char *to, unsigned flags)
{
    if (!fails()) return __real_renameat2(a, from, b, to, flags);
    errno = EACCES;
    return -1;
}

static char dir[256], path[4096];

static void setup(void)
{
    err e;
    calls = 0;
    fail_at = -1;
    tempdir_make(dir, sizeof dir);
    ck_assert_int_eq(path_join(path, sizeof path, dir, "out.bin", &e), OK);
}

static void teardown(void) { tempdir_drop(dir); }

static const char *in_dir(const char *name)
{
    static char buf[4096];
    err e;
    ck_assert_int_eq(path_join(buf, sizeof buf, dir, name, &e), OK);
    return buf;
}

static void put(const char *name, const char *text)
{
    FILE *f = fopen(name, "w");
    ck_assert_ptr_nonnull(f);
    ck_assert(fputs(text, f) >= 0 && fclose(f) == 0);
}

static void expect(const char *name, const char *text)
{
    char *got;
    size_t n;
    err e;
    ck_assert_msg(file_read(&got, &n, name, 1 << 20, &e) == OK, "%s", e.msg);
    ck_assert_str_eq(got, text);
    mem_free(got);
}

/* Names in `dir`, hidden ones and directories too. */
static int entries(void)
{
    char command[512], text[32] = "";
    (void)snprintf(command, sizeof command, "ls -A '%s' | wc -l", dir);
    FILE *p = popen(command, "r");
    ck_assert(p && fgets(text, sizeof text, p));
    (void)pclose(p);
    return atoi(text);
}

static err_code write_out(bool force, err *e)
{
    file_writer *w = NULL;
    char big[70000];
    err_code rc = file_writer_open(&w, path, force, e);
    memset(big, 'b', sizeof big);
    if (rc == OK) rc = file_writer_write(w, "head ", 5, e);
    if (rc == OK) rc = file_writer_write(w, big, sizeof big, e);
    if (rc == OK) rc = file_writer_write(w, " tail", 5, e);
    if (rc == OK) rc = file_writer_pwrite(w, "HEAD", 4, 0, e);
    if (rc == OK) rc = file_writer_commit(&w, e);
    file_writer_abort(&w);
    return rc;
}

static void check_out(void)
{
    char *got;
    size_t n;
    err e;
    ck_assert_msg(file_read(&got, &n, path, 1 << 20, &e) == OK, "%s", e.msg);
    ck_assert_uint_eq(n, 70010);
    ck_assert(memcmp(got, "HEAD bbb", 8) == 0 && memcmp(got + n - 8, "bbb tail", 8) == 0);
    mem_free(got);
}

START_TEST(writer_basic)
{
    err e;
    (void)umask(027);
    ck_assert_msg(write_out(false, &e) == OK, "%s", e.msg);
    check_out();
    struct stat st;
    ck_assert(stat(path, &st) == 0 && (st.st_mode & 0777) == 0640);
    ck_assert_int_eq(write_out(false, &e), E_USAGE);
    ck_assert_ptr_nonnull(strstr(e.msg, "exists, use --force"));
    put(path, "old");
    ck_assert_int_eq(write_out(true, &e), OK);
    check_out();
    ck_assert_int_eq(entries(), 1);
}
END_TEST

START_TEST(writer_every_call_fails)
{
    err e;
    ck_assert_int_eq(write_out(false, &e), OK);
    const int total = calls;
    ck_assert_int_ge(total, 5);
    for (int force = 0; force < 2; force++) {
        const int last = total - 1 -
                         force; /* the directory's sync; with force, rename is not counted */
        for (int k = 0; k <= last; k++) {
            if (force)
                put(path, "old result");
            else
                (void)unlink(path);
            calls = 0;
            fail_at = k;
            const err_code rc = write_out(force, &e);
            fail_at = -1;
            ck_assert_msg(rc == E_IO, "force %d, call %d: %s", force, k, err_name(rc));
            ck_assert_ptr_nonnull(strstr(e.msg, "out.bin"));
            ck_assert_int_eq(entries(), force || k == last);
            if (force && k < last) expect(path, "old result");
        }
    }
}
END_TEST

START_TEST(writer_killed)
{
    err e;
    const pid_t pid = fork();
    if (pid == 0) {
        file_writer *w;
        if (file_writer_open(&w, path, false, &e) != OK) _exit(1);
        if (file_writer_pwrite(w, "half", 4, 100000, &e) != OK) _exit(1);
        (void)raise(SIGKILL);
    }
    int status;
    ck_assert(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
    ck_assert(!file_exists(path));
    ck_assert_int_eq(entries(), 1);
    ck_assert_int_eq(write_out(false, &e), OK); /* takes the litter over */
    check_out();
    ck_assert_int_eq(entries(), 1);
}
END_TEST

START_TEST(writer_two_at_once)
{
    err e;
    file_writer *a, *b;
    ck_assert_int_eq(file_writer_open(&a, path, false, &e), OK);
    ck_assert_int_eq(file_writer_open(&b, path, false, &e), E_IO);
    ck_assert_ptr_nonnull(strstr(e.msg, "being written by another"));
    put(path, "came between");
    ck_assert_int_eq(file_writer_commit(&a, &e), E_USAGE);
    ck_assert_ptr_null(a);
    expect(path, "came between");
    ck_assert_int_eq(entries(), 1);
}
END_TEST

START_TEST(writer_bad_targets)
{
    err e;
    file_writer *w = NULL;
    dir_writer *d = NULL;
    ck_assert_int_eq(file_writer_open(&w, dir, true, &e), E_USAGE);
    ck_assert_int_eq(file_writer_open(&w, "/dev/null", true, &e), E_USAGE);
    ck_assert_int_eq(file_writer_open(&w, "/", true, &e), E_USAGE);
    ck_assert_int_eq(file_writer_open(&w, "", true, &e), E_USAGE);
    ck_assert_int_eq(file_writer_open(&w, "..", true, &e), E_USAGE);
    ck_assert_int_eq(file_writer_open(&w, in_dir("no/such/dir"), false, &e), E_IO);
    put(path, "a file");
    ck_assert_int_eq(file_writer_open(&w, in_dir("out.bin/x"), false, &e), E_IO);
    ck_assert_int_eq(dir_writer_open(&d, path, true, false, &e), E_USAGE);
    ck_assert_ptr_null(w);
    ck_assert_ptr_null(d);
    ck_assert_int_eq(entries(), 1);
}
END_TEST

/* In a child: writes more than it is allowed to and reports how that ended. */
static int write_too_much(void)
{
    err e;
    file_writer *w = NULL;
    char block[4096] = {0};
    if (file_writer_open(&w, path, false, &e) != OK) return 100;
    err_code rc = OK;
    for (int i = 0; rc == OK && i < 4096; i++) rc = file_writer_write(w, block, sizeof block, &e);
    if (rc == OK) rc = file_writer_commit(&w, &e);
    file_writer_abort(&w);
    return rc;
}

START_TEST(writer_size_limit)
{
    const pid_t pid = fork();
    if (pid == 0) {
        const struct rlimit limit = {1 << 20, 1 << 20};
        (void)signal(SIGXFSZ, SIG_IGN);
        if (setrlimit(RLIMIT_FSIZE, &limit) != 0) _exit(101);
        _exit(write_too_much());
    }
    int status;
    ck_assert(waitpid(pid, &status, 0) == pid);
    ck_assert(WIFEXITED(status));
    ck_assert_int_eq(WEXITSTATUS(status), E_IO);
    ck_assert_int_eq(entries(), 0);
}
END_TEST

START_TEST(writer_disk_full)
{
    if (mount("tmpfs", dir, "tmpfs", 0, "size=1m") != 0) {
        printf("SKIP writer_disk_full: cannot mount a small disk (%s)\n", strerror(errno));
        return;
    }
    const int rc = write_too_much();
    const int left = entries();
    ck_assert_int_eq(umount(dir), 0);
    ck_assert_int_eq(rc, E_IO);
    ck_assert_int_eq(left, 0);
}
END_TEST

START_TEST(writer_read_only)
{
    err e;
    file_writer *w = NULL;
    if (mount("tmpfs", dir, "tmpfs", MS_RDONLY, "size=1m") != 0) {
        printf("SKIP writer_read_only: cannot mount a read-only disk (%s)\n", strerror(errno));
        return;
    }
    const err_code rc = file_writer_open(&w, path, false, &e);
    ck_assert_int_eq(umount(dir), 0);
    ck_assert_int_eq(rc, E_IO);
    ck_assert_ptr_nonnull(strstr(e.msg, "Read-only file system"));
}
END_TEST

static void fill(const dir_writer *d, const char *text)
{
    char name[4096];
    err e;
    ck_assert_int_eq(path_join(name, sizeof name, dir_writer_path(d), "sub", &e), OK);
    ck_assert_int_eq(dir_make(name, &e), OK);
    ck_assert_int_eq(path_join(name, sizeof name, dir_writer_path(d), "sub/a", &e), OK);
    put(name, text);
}

START_TEST(dirs_basic)
{
    err e;
    dir_writer *d;
    char target[4096], inside[4096];
    ck_assert_int_eq(path_join(target, sizeof target, dir, "model", &e), OK);
    ck_assert_int_eq(path_join(inside, sizeof inside, dir, "model/sub/a", &e), OK);
    ck_assert_int_eq(dir_writer_open(&d, target, false, false, &e), OK);
    fill(d, "one");
    ck_assert(!file_exists(target));
    ck_assert_msg(dir_writer_commit(&d, &e) == OK, "%s", e.msg);
    ck_assert_ptr_null(d);
    expect(inside, "one");
    ck_assert_int_eq(dir_writer_open(&d, target, false, false, &e), E_USAGE);
    ck_assert_int_eq(dir_writer_open(&d, in_dir("model///"), true, false, &e), OK);
    fill(d, "two");
    expect(inside, "one");
    ck_assert_msg(dir_writer_commit(&d, &e) == OK, "%s", e.msg);
    expect(inside, "two");
    ck_assert_int_eq(entries(), 1);
    ck_assert_int_eq(dir_writer_open(&d, target, true, false, &e), OK);
    fill(d, "three");
    dir_writer_abort(&d);
    expect(inside, "two");
    ck_assert_int_eq(entries(), 1);
    ck_assert_int_eq(dir_make(in_dir("empty"), &e), OK);
    ck_assert_int_eq(dir_writer_open(&d, in_dir("empty"), false, false, &e), OK);
    ck_assert_int_eq(dir_writer_commit(&d, &e), OK);
}
END_TEST

START_TEST(dirs_resume)
{
    err e;
    dir_writer *d, *other;
    char name[4096];
    ck_assert_int_eq(dir_writer_open(&d, path, false, true, &e), OK);
    fill(d, "first half");
    ck_assert_int_eq(dir_writer_open(&other, path, false, true, &e), E_IO); /* in use */
    dir_writer_leave(&d);
    ck_assert_int_eq(dir_writer_open(&d, path, false, true, &e), OK);
    ck_assert_int_eq(path_join(name, sizeof name, dir_writer_path(d), "sub/a", &e), OK);
    expect(name, "first half");
    dir_writer_leave(&d);
    ck_assert_int_eq(dir_writer_open(&d, path, false, false, &e), OK); /* not kept: empty again */
    ck_assert(!file_exists(name));
    dir_writer_abort(&d);
    ck_assert_int_eq(entries(), 0);
}
END_TEST

START_TEST(dirs_every_call_fails)
{
    err e;
    dir_writer *d;
    char inside[4096];
    ck_assert_int_eq(path_join(inside, sizeof inside, dir, "out.bin/sub/a", &e), OK);
    for (int k = 0; k < 4; k++) { /* sync of file, sub, directory; rename */
        ck_assert_int_eq(dir_writer_open(&d, path, false, false, &e), OK);
        fill(d, "new");
        calls = 0;
        fail_at = k;
        const err_code rc = dir_writer_commit(&d, &e);
        fail_at = -1;
        ck_assert_msg(rc == E_IO, "call %d: %s", k, err_name(rc));
        ck_assert_int_eq(entries(), 0);
    }
}
END_TEST

START_TEST(maps_and_reads)
{
    err e;
    file_map m;
    char *text;
    size_t n;
    uint64_t size;
    put(path, "hello");
    ck_assert_int_eq(file_map_open(&m, path, &e), OK);
    ck_assert(m.size == 5 && memcmp(m.data, "hello", 5) == 0);
    file_map_willneed(&m, 0, 5);
    file_map_willneed(&m, 4, SIZE_MAX);
    file_map_dontneed(&m, 2, 1);
    file_map_dontneed(&m, 9, 1);
    ck_assert(memcmp(m.data, "hello", 5) == 0);
    file_map_close(&m);
    ck_assert_int_eq(file_read(&text, &n, path, 5, &e), OK);
    ck_assert_str_eq(text, "hello");
    mem_free(text);
    ck_assert_int_eq(file_read(&text, &n, path, 4, &e), E_LIMIT);
    ck_assert_ptr_null(text);
    ck_assert_int_eq(file_size(&size, path, &e), OK);
    ck_assert_uint_eq(size, 5);
    put(path, "");
    ck_assert_int_eq(file_map_open(&m, path, &e), OK);
    ck_assert(m.size == 0 && m.data == NULL);
    file_map_close(&m);
    ck_assert_int_eq(file_map_open(&m, dir, &e), E_INPUT);
    ck_assert_int_eq(file_map_open(&m, in_dir("none"), &e), E_IO);
    ck_assert_int_eq(mkfifo(in_dir("fifo"), 0600), 0);
    ck_assert_int_eq(file_map_open(&m, in_dir("fifo"), &e), E_INPUT); /* without waiting */
    ck_assert_int_eq(file_read(&text, &n, "/dev/zero", 10, &e), E_INPUT);
    ck_assert_int_eq(symlink("loop", in_dir("loop")), 0);
    ck_assert_int_eq(file_map_open(&m, in_dir("loop"), &e), E_IO);
}
END_TEST

START_TEST(paths)
{
    err e;
    char buf[8];
    ck_assert_int_eq(path_join(buf, sizeof buf, "a/", "b", &e), OK);
    ck_assert_str_eq(buf, "a/b");
    ck_assert_int_eq(path_join(buf, sizeof buf, "", "b", &e), OK);
    ck_assert_str_eq(buf, "b");
    ck_assert_int_eq(path_join(buf, sizeof buf, "1234", "567", &e), E_LIMIT);
    ck_assert_str_eq(path_base("a/b"), "b");
    ck_assert_str_eq(path_base("b"), "b");
    ck_assert(path_is_plain_name("model-00001-of-2.safetensors"));
    ck_assert(!path_is_plain_name("") && !path_is_plain_name(".") && !path_is_plain_name(".."));
    ck_assert(!path_is_plain_name("a/b") && !path_is_plain_name("a\n") &&
              !path_is_plain_name("\x7f"));
}
END_TEST

START_TEST(trees_and_lists)
{
    err e;
    dir_list l;
    char outside[4096];
    ck_assert_int_eq(path_join(outside, sizeof outside, dir, "outside", &e), OK);
    ck_assert_int_eq(dir_make(in_dir("t/u/v"), &e), OK);
    ck_assert_int_eq(dir_make(in_dir("t/u/v/"), &e), OK);
    put(outside, "stays");
    put(in_dir("t/b"), "");
    put(in_dir("t/a"), "");
    ck_assert_int_eq(symlink("../outside", in_dir("t/c")), 0);
    ck_assert_int_eq(symlink("nowhere", in_dir("t/d")), 0);
    ck_assert_int_eq(symlink("..", in_dir("t/up")), 0);
    ck_assert_int_eq(dir_list_open(&l, in_dir("t"), &e), OK);
    ck_assert_uint_eq(l.n, 3);
    ck_assert(!strcmp(l.names[0], "a") && !strcmp(l.names[1], "b") && !strcmp(l.names[2], "c"));
    dir_list_free(&l);
    ck_assert_int_eq(file_copy(outside, in_dir("t/copy"), &e), OK);
    expect(in_dir("t/copy"), "stays");
    ck_assert_int_eq(dir_make(in_dir("outside/x"), &e), E_IO);
    ck_assert_int_eq(dir_remove_tree(in_dir("t"), &e), OK); /* links go, what they name stays */
    expect(outside, "stays");
    ck_assert_int_eq(dir_remove_tree(in_dir("t"), &e), OK);
    ck_assert_int_eq(dir_list_open(&l, in_dir("t"), &e), E_IO);
}
END_TEST

START_TEST(locks)
{
    err e;
    file_lock a, b;
    char want[64];
    ck_assert_int_eq(file_lock_take(&a, path, &e), OK);
    ck_assert_int_eq(file_lock_take(&b, path, &e), E_IO);
    (void)snprintf(want, sizeof want, "in use by process %ld", (long)getpid());
    ck_assert_msg(strstr(e.msg, want) != NULL, "%s", e.msg);
    file_lock_drop(&b); /* a lock that was not taken */
    file_lock_drop(&a);
    ck_assert_int_eq(file_lock_take(&b, path, &e), OK);
    file_lock_drop(&b);
    ck_assert_int_eq(entries(), 0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("base file");
    TCase *t = tcase_create("all");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, writer_basic);
    tcase_add_test(t, writer_every_call_fails);
    tcase_add_test(t, writer_killed);
    tcase_add_test(t, writer_two_at_once);
    tcase_add_test(t, writer_bad_targets);
    tcase_add_test(t, writer_size_limit);
    tcase_add_test(t, writer_disk_full);
    tcase_add_test(t, writer_read_only);
    tcase_add_test(t, dirs_basic);
    tcase_add_test(t, dirs_resume);
    tcase_add_test(t, dirs_every_call_fails);
    tcase_add_test(t, maps_and_reads);
    tcase_add_test(t, paths);
    tcase_add_test(t, trees_and_lists);
    tcase_add_test(t, locks);
    suite_add_tcase(s, t);
    return suite_run(s);
}
