/* The server before it has a model, and its sockets. With one: the serve_*.py suites. */
#include <arpa/inet.h>
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "runtime/serve/server.h"
#include "support/alloc_fail.h"
#include "support/suite.h"

static int lines;

static void on_line(void *ud, const char *line)
{
    (void)ud;
    lines += line[0] == '{' && strstr(line, "\"code\":") != NULL;
}

static server_opts options(void)
{
    static const char *const names[] = {"m"};
    return (server_opts){.http = {.host = "127.0.0.1",
                                  .max_connections = 8,
                                  .max_body_bytes = 4096,
                                  .head_ms = 20000,
                                  .body_ms = 20000,
                                  .idle_ms = 20000,
                                  .stall_ms = 20000},
                         .names = names,
                         .n_names = 1,
                         .check_host = true,
                         .max_head_bytes = 8192,
                         .log = on_line};
}

static int connect_tcp(const server *s)
{
    const struct sockaddr_in a = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)server_port(s)),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(fd, (const struct sockaddr *)&a, sizeof a), 0);
    return fd;
}

/* Everything that comes back until the connection ends. */
static const char *talk(int fd, const char *request)
{
    static char text[16384];
    size_t n = 0;
    ssize_t got;
    ck_assert_int_eq(send(fd, request, strlen(request), MSG_NOSIGNAL), (ssize_t)strlen(request));
    while (n < sizeof text - 1 && (got = recv(fd, text + n, sizeof text - 1 - n, 0)) > 0)
        n += (size_t)got;
    text[n] = 0;
    (void)close(fd);
    return text;
}

#define HEAD " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"

START_TEST(test_loading)
{
    static const char ask[] = "POST /v1/chat/completions" HEAD
                              "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    const server_opts o = options();
    server *s;
    err e;
    lines = 0;
    ck_assert_msg(server_open(&s, &o, NULL, &e) == OK, "%s", e.msg);
    server_loading(s, 40);
    const char *a = talk(connect_tcp(s), ask);
    ck_assert_ptr_nonnull(strstr(a, "HTTP/1.1 503"));
    ck_assert_ptr_nonnull(strstr(a, "Retry-After: "));
    ck_assert_ptr_nonnull(strstr(a, "service_unavailable"));
    ck_assert_ptr_nonnull(strstr(a, "40 %"));
    ck_assert_ptr_nonnull(strstr(talk(connect_tcp(s), "GET /readyz" HEAD "\r\n"), " 503 "));
    ck_assert_ptr_nonnull(strstr(talk(connect_tcp(s), "GET /livez" HEAD "\r\n"), " 200 OK"));
    ck_assert_ptr_nonnull(strstr(talk(connect_tcp(s), "GET /v1/models" HEAD "\r\n"), "\"m\""));
    ck_assert_ptr_nonnull(strstr(talk(connect_tcp(s), "GET /metrics" HEAD "\r\n"), "tm_ready 0"));
    while (server_active(s)) (void)usleep(1000); /* its books are closed behind the last byte */
    server_close(&s);
    ck_assert_ptr_null(s);
    ck_assert_int_eq(lines, 5);
}
END_TEST

/* A request that stays unfinished is answered and ended although the library still reads it. */
START_TEST(test_deadlines)
{
    server_opts o = options();
    server *s;
    err e;
    o.http.head_ms = o.http.body_ms = 300;
    o.http.idle_ms = 1000;
    ck_assert_msg(server_open(&s, &o, NULL, &e) == OK, "%s", e.msg);
    const char *a = talk(connect_tcp(s), "GET /live");
    ck_assert_ptr_nonnull(strstr(a, "HTTP/1.1 408"));
    ck_assert_ptr_nonnull(strstr(a, "request_timeout"));
    a = talk(connect_tcp(s), "POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                             "application/json\r\nContent-Length: 10\r\n\r\n{");
    ck_assert_ptr_nonnull(strstr(a, "HTTP/1.1 408"));
    a = talk(connect_tcp(s), "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"); /* then idle */
    ck_assert_ptr_nonnull(strstr(a, "200 OK"));
    ck_assert_ptr_null(strstr(a, "408"));
    server_close(&s);
}
END_TEST

START_TEST(test_unix_socket)
{
    char dir[64], path[96];
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    struct stat st;
    server_opts o = options();
    server *s;
    err e;
    (void)snprintf(dir, sizeof dir, "/tmp/tmf-socket-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    (void)snprintf(path, sizeof path, "%s/s", dir);
    o.http.unix_path = path;
    ck_assert_msg(server_open(&s, &o, NULL, &e) == OK, "%s", e.msg);
    ck_assert_int_eq(stat(path, &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0600);
    (void)snprintf(a.sun_path, sizeof a.sun_path, "%s", path);
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(fd, (const struct sockaddr *)&a, sizeof a), 0);
    ck_assert_ptr_nonnull(strstr(talk(fd, "GET /livez" HEAD "\r\n"), " 200 OK"));
    server_close(&s);
    ck_assert_int_ne(stat(path, &st), 0);
    FILE *f = fopen(path, "w"); /* no socket: it is not ours to remove */
    ck_assert_ptr_nonnull(f);
    (void)fclose(f);
    ck_assert_int_eq(server_open(&s, &o, NULL, &e), E_IO);
    (void)unlink(path);
    (void)rmdir(dir);
}
END_TEST

START_TEST(test_bad_options)
{
    static const char *const empty[] = {""};
    server_opts o = options();
    server *s, *other;
    err e;
    o.keys = empty;
    o.n_keys = 1;
    ck_assert_int_eq(server_open(&s, &o, NULL, &e), E_USAGE);
    o.n_keys = 0;
    o.http.host = "no.such.host.invalid";
    ck_assert_int_eq(server_open(&s, &o, NULL, &e), E_IO);
    ck_assert_ptr_null(s);
    o = options();
    ck_assert_int_eq(server_open(&s, &o, NULL, &e), OK);
    o.http.port = server_port(s);
    ck_assert_int_eq(server_open(&other, &o, NULL, &e), E_IO);
    ck_assert_ptr_nonnull(strstr(e.msg, "127.0.0.1:"));
    server_close(&s);
}
END_TEST

START_TEST(test_every_allocation)
{
    const server_opts o = options();
    server *s;
    err e;
    long n = 0;
    for (;;) {
        alloc_fail_at(++n);
        const err_code rc = server_open(&s, &o, NULL, &e);
        if (!alloc_failed()) break;
        ck_assert_int_eq(rc, E_NOMEM);
        ck_assert_ptr_null(s);
    }
    alloc_fail_at(0);
    ck_assert_int_gt(n, 5);
    /* and of a request: an answer, whole or refused, or the end of the connection */
    for (long k = 1; k < 12; k++) {
        alloc_fail_at(k);
        (void)talk(connect_tcp(s), "GET /v1/models" HEAD "\r\n");
    }
    alloc_fail_at(0);
    ck_assert_ptr_nonnull(strstr(talk(connect_tcp(s), "GET /v1/models" HEAD "\r\n"), " 200 OK"));
    server_close(&s);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("server");
    TCase *t = tcase_create("server");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, test_loading);
    tcase_add_test(t, test_deadlines);
    tcase_add_test(t, test_unix_socket);
    tcase_add_test(t, test_bad_options);
    tcase_add_test(t, test_every_allocation);
    suite_add_tcase(s, t);
    return suite_run(s);
}
