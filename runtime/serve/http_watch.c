/* A peer that sends a byte now and then never looks idle to the library: limits here count from
 * the beginning of what is waited for. */
#include "runtime/serve/http_watch.h"

#include <errno.h>
#include <linux/sockios.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

#include "base/mem.h"

#define WATCH_PERIOD_MS 200

struct http_watch {
    http_watch_opts o;
    http_watch_slot *slots; /* [o.slots] */
    pthread_mutex_t lock;   /* of fd in slots: a socket is not closed while it is looked at */
    pthread_cond_t wake;
    pthread_t thread;
    bool started, stop;
};

static long long now_ms(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (long long)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void http_watch_set(http_watch_slot *s, http_watch_state state)
{
    atomic_store_explicit(&s->since_ms, now_ms(), memory_order_relaxed);
    atomic_store_explicit(&s->state, (int)state, memory_order_relaxed);
}

/* The request cannot be answered through the library, which still reads it: the status goes onto
 * the socket as it is, and the library sees the end of the connection. */
static void expire(http_watch *w, http_watch_slot *s, http_watch_state state)
{
    char text[768];
    const char *body = w->o.timeout_body;
    atomic_store(&s->expired, true);
    if (state <= WATCH_BODY && body) {
        const int n = snprintf(text, sizeof text,
                               "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
                               "Connection: close\r\nx-request-id: req-timeout-%llx\r\n"
                               "Content-Length: %zu\r\n\r\n%s",
                               (unsigned long long)now_ms(), strlen(body), body);
        if (n > 0 && (size_t)n < sizeof text)
            (void)send(s->fd, text, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    (void)shutdown(s->fd, SHUT_RDWR);
}

/* A slow reader that reads is not stalled. */
static bool made_progress(http_watch_slot *s)
{
    int unsent = 0;
    if (ioctl(s->fd, SIOCOUTQ, &unsent) != 0 || unsent == s->unsent) return false;
    s->unsent = unsent;
    return true;
}

static void look_at(http_watch *w, http_watch_slot *s, long long now)
{
    const http_watch_state state = (http_watch_state)atomic_load(&s->state);
    const int32_t limit = w->o.limit_ms[state];
    if (s->fd < 0 || limit == 0 || atomic_load(&s->expired)) return;
    if (now - atomic_load(&s->since_ms) < limit) return;
    if (state == WATCH_WRITE && made_progress(s))
        atomic_store(&s->since_ms, now);
    else if ((http_watch_state)atomic_load(&s->state) == state)
        expire(w, s, state);
}

static void *watch_main(void *arg)
{
    http_watch *w = arg;
    (void)pthread_mutex_lock(&w->lock);
    while (!w->stop) {
        struct timespec until;
        const long long now = now_ms();
        for (int32_t i = 0; i < w->o.slots; i++) look_at(w, &w->slots[i], now);
        (void)clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += WATCH_PERIOD_MS * 1000000L;
        until.tv_sec += until.tv_nsec / 1000000000L;
        until.tv_nsec %= 1000000000L;
        (void)pthread_cond_timedwait(&w->wake, &w->lock, &until);
    }
    (void)pthread_mutex_unlock(&w->lock);
    return NULL;
}

err_code http_watch_open(http_watch **out, const http_watch_opts *o, err *e)
{
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(http_watch), "connections", e));
    http_watch *w = p;
    w->o = *o;
    (void)pthread_mutex_init(&w->lock, NULL);
    (void)pthread_cond_init(&w->wake, NULL);
    err_code rc = mem_alloc(&p, (size_t)o->slots, sizeof(http_watch_slot), "connections", e);
    if (rc == OK) {
        w->slots = p;
        for (int32_t i = 0; i < o->slots; i++) w->slots[i].fd = -1;
        const int failed = pthread_create(&w->thread, NULL, watch_main, w);
        if (failed) rc = err_sys(e, E_NOMEM, failed, "cannot start a thread");
        w->started = !failed;
    }
    if (rc != OK) http_watch_close(&w);
    *out = w;
    return rc;
}

void http_watch_close(http_watch **w)
{
    if (!w || !*w) return;
    if ((*w)->started) {
        (void)pthread_mutex_lock(&(*w)->lock);
        (*w)->stop = true;
        (void)pthread_cond_signal(&(*w)->wake);
        (void)pthread_mutex_unlock(&(*w)->lock);
        (void)pthread_join((*w)->thread, NULL);
    }
    (void)pthread_cond_destroy(&(*w)->wake);
    (void)pthread_mutex_destroy(&(*w)->lock);
    mem_free((*w)->slots);
    mem_free(*w);
    *w = NULL;
}

http_watch_slot *http_watch_add(http_watch *w, int fd, void *ud)
{
    http_watch_slot *found = NULL;
    (void)pthread_mutex_lock(&w->lock);
    for (int32_t i = 0; i < w->o.slots && !found; i++) {
        if (w->slots[i].fd >= 0) continue;
        found = &w->slots[i];
        found->fd = fd;
        found->unsent = 0;
        found->ud = ud;
        atomic_store(&found->expired, false);
        http_watch_set(found, WATCH_FRESH);
    }
    (void)pthread_mutex_unlock(&w->lock);
    return found;
}

void http_watch_remove(http_watch *w, http_watch_slot *s)
{
    (void)pthread_mutex_lock(&w->lock);
    s->fd = -1;
    (void)pthread_mutex_unlock(&w->lock);
}
