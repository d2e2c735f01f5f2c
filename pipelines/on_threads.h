/* Runs one function on several threads that end with the call. Python's threads handle signals, these do not. */

#ifndef ON_THREADS_H
#define ON_THREADS_H

#include <pthread.h>
#include <signal.h>
#include <stdint.h>

enum { MAX_THREADS = 64 };

/* Call work(queue) on up to `threads` threads, one of them the calling one, for `count` items that `work` takes from the queue. */
static void on_threads(void *(*work)(void *), void *queue, int64_t count, int64_t threads) {
    pthread_t others[MAX_THREADS];
    int64_t started = 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started < threads - 1 && started < count - 1 && started < MAX_THREADS)
        if (pthread_create(others + started, NULL, work, queue) == 0)
            started++;
        else
            break; /* fewer threads also work */
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    work(queue);
    for (int64_t n = 0; n < started; n++) pthread_join(others[n], NULL);
}

#endif
