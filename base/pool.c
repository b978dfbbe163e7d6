/* Thread pool for many short runs. One atomic counter, `left`, is the whole protocol: a thread
 * claims an item by taking it down by one. A run cannot end while a claimed item is unfinished, so
 * whoever has claimed one may read the run's fields; whoever comes late finds nothing left and
 * touches nothing. The caller waits for items, not for threads: a descheduled worker delays only
 * what it has claimed. */
#include "base/pool.h"

#include <assert.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/mem.h"

#define POOL_MAX 1024
#define POOL_SPIN_NS \
    60000 /* about one decode layer's gap; longer costs other processes more than it gains */

struct pool {
    /* Each group of fields that is written together has its own cache line. */
    _Alignas(64) _Atomic int64_t left; /* unclaimed items of the run */
    pool_fn fn;
    void *ctx;
    int64_t n;
    _Alignas(64) _Atomic int64_t done;      /* finished items */
    _Alignas(64) _Atomic uint32_t finished; /* futex: runs that a worker finished */
    atomic_bool waiting;                    /* the caller sleeps on `finished` */
    _Alignas(64) _Atomic uint32_t started;  /* futex: runs begun */
    atomic_int sleepers;
    atomic_bool stop;
    int threads; /* the caller included */
    bool spin;
    pthread_t *worker; /* [threads - 1] */
};

typedef struct {
    pool *p;
    int id;
} pool_arg;

static void futex_wait(_Atomic uint32_t *word, uint32_t seen)
{
    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL,
                  0); /* woken, changed or a signal */
}

static void futex_wake(_Atomic uint32_t *word, int count)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Claims and computes items until none is left; returns true when it finished the run's last
 * one. */
static bool pool_work(pool *p, int id)
{
    int64_t mine = 0, n = 0;
    int64_t left = atomic_load_explicit(&p->left, memory_order_acquire);
    while (left > 0) {
        if (!atomic_compare_exchange_weak_explicit(&p->left, &left, left - 1, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        n = p->n;
        p->fn(p->ctx, n - left, id);
        mine++;
        left = atomic_load_explicit(&p->left, memory_order_acquire);
    }
    return mine && atomic_fetch_add_explicit(&p->done, mine, memory_order_acq_rel) + mine == n;
}

/* True when there is something to do (or to stop for) before the time is up. */
static bool pool_spin(const pool *p)
{
    if (!p->spin) return atomic_load(&p->left) > 0;
    const int64_t until = now_ns() + POOL_SPIN_NS;
    do {
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(&p->left, memory_order_relaxed) > 0) return true;
            cpu_relax();
        }
    } while (now_ns() < until && !atomic_load_explicit(&p->stop, memory_order_relaxed));
    return false;
}

/* Sequentially consistent on both sides: either the caller sees a sleeper, or the sleeper a new
 * `started`. */
static void pool_sleep(pool *p)
{
    const uint32_t seen = atomic_load(&p->started);
    if (atomic_load(&p->left) > 0 || atomic_load(&p->stop)) return;
    atomic_fetch_add(&p->sleepers, 1);
    if (atomic_load(&p->started) == seen) futex_wait(&p->started, seen);
    atomic_fetch_sub(&p->sleepers, 1);
}

static void *pool_main(void *arg)
{
    const pool_arg a = *(pool_arg *)arg;
    mem_free(arg);
    pool *p = a.p;
    while (!atomic_load_explicit(&p->stop, memory_order_acquire)) {
        if (!pool_spin(p)) {
            pool_sleep(p);
            continue;
        }
        if (pool_work(p, a.id)) {
            atomic_fetch_add(&p->finished, 1);
            if (atomic_load(&p->waiting)) futex_wake(&p->finished, 1);
        }
    }
    return NULL;
}

/* Waits until a worker has raised `finished` above `before`. */
static void pool_wait(pool *p, uint32_t before)
{
    const int64_t until = p->spin ? now_ns() + POOL_SPIN_NS : 0;
    while (p->spin && now_ns() < until) {
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(&p->finished, memory_order_acquire) != before) return;
            cpu_relax();
        }
    }
    atomic_store(&p->waiting, true);
    while (atomic_load(&p->finished) == before) futex_wait(&p->finished, before);
    atomic_store(&p->waiting, false);
}

void pool_run(pool *p, pool_fn fn, void *ctx, int64_t n)
{
    if (!p || p->threads == 1 || n <= 1) {
        for (int64_t i = 0; i < n; i++) fn(ctx, i, 0);
        return;
    }
    const uint32_t before = atomic_load_explicit(&p->finished, memory_order_relaxed);
    assert(atomic_load(&p->left) == 0); /* not reentrant */
    p->fn = fn;
    p->ctx = ctx;
    p->n = n;
    atomic_store_explicit(&p->done, 0, memory_order_relaxed);
    atomic_store(&p->left, n);
    atomic_fetch_add(&p->started, 1);
    if (atomic_load(&p->sleepers) > 0)
        futex_wake(&p->started, n - 1 < p->threads - 1 ? (int)(n - 1) : p->threads - 1);
    if (!pool_work(p, 0)) pool_wait(p, before);
}

/* CPUs by a control group's quota, rounded up; 0 where there is none. */
static int pool_quota(void)
{
    char text[64] = "";
    long long quota = 0, period = 0;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "re");
    if (!f) return 0;
    const bool got = fgets(text, sizeof text, f) != NULL;
    (void)fclose(f);
    if (!got || sscanf(text, "%lld %lld", &quota, &period) != 2 || quota <= 0 || period <= 0)
        return 0;
    const long long cpus = (quota + period - 1) / period;
    return cpus < POOL_MAX ? (int)cpus : POOL_MAX;
}

int pool_cpu_count(void)
{
    cpu_set_t set;
    int n = 1;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        n = CPU_COUNT(&set);
    } else {
        const long online = sysconf(_SC_NPROCESSORS_ONLN); /* more CPUs than cpu_set_t holds */
        if (online > 0) n = (int)online;
    }
    const int quota = pool_quota();
    if (quota && quota < n) n = quota;
    return n < POOL_MAX ? n : POOL_MAX;
}

static err_code pool_start(pool *p, int id, err *e)
{
    void *arg;
    TRY(mem_alloc(&arg, 1, sizeof(pool_arg), "thread", e));
    *(pool_arg *)arg = (pool_arg){p, id};
    const int rc = pthread_create(&p->worker[id - 1], NULL, pool_main, arg);
    if (rc != 0) {
        mem_free(arg);
        return err_sys(e, E_NOMEM, rc, "cannot start thread %d of %d", id + 1, p->threads);
    }
    return OK;
}

/* Stops and joins the workers 1..started. */
static void pool_stop(pool *p, int started)
{
    atomic_store(&p->stop, true);
    atomic_fetch_add(&p->started, 1);
    futex_wake(&p->started, POOL_MAX);
    for (int i = 1; i <= started; i++) (void)pthread_join(p->worker[i - 1], NULL);
    mem_free(p->worker);
    mem_free(p);
}

err_code pool_open(pool **out, int threads, err *e)
{
    void *mem;
    sigset_t all, old;
    *out = NULL;
    const int cpus = pool_cpu_count();
    if (threads == 0) threads = cpus;
    if (threads < 1 || threads > POOL_MAX)
        return err_set(e, E_USAGE, "threads: expected 0 to %d, got %d", POOL_MAX, threads);
    TRY(mem_alloc(&mem, 1, sizeof(pool), "thread pool", e));
    pool *p = mem;
    p->threads = threads;
    p->spin = threads <=
              cpus; /* with fewer CPUs than threads, spinning takes the CPU from the work */
    err_code rc = mem_alloc(&mem, (size_t)threads, sizeof(pthread_t), "thread pool", e);
    if (rc != OK) {
        mem_free(p);
        return rc;
    }
    p->worker = mem;
    (void)sigfillset(&all); /* signals are for the caller's thread */
    (void)pthread_sigmask(SIG_SETMASK, &all, &old);
    int started = 0;
    while (rc == OK && started < threads - 1)
        if ((rc = pool_start(p, started + 1, e)) == OK) started++;
    (void)pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc != OK)
        pool_stop(p, started);
    else
        *out = p;
    return rc;
}

void pool_close(pool **p)
{
    if (!*p) return;
    pool_stop(*p, (*p)->threads - 1);
    *p = NULL;
}

int pool_threads(const pool *p) { return p ? p->threads : 1; }
