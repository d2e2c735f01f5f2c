/* Asks again and again whether a CUDA stream has work. It is C because it must not need Python's lock: a thread that waits for
 * the lock gets it where the launching thread drops it, which is next to its launches and no fair sample of the time. */

#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <time.h>

enum { BETWEEN, IN_STEP, OFF, CLOSED };
enum { DONE = 0, NOT_READY = 600 }; /* what cudaStreamQuery says; anything else is an error */

static const double PAUSE = 2e-3; /* seconds between two samples, on average */

/* The layout is that of `_Record` in device_clock.py. Python writes the first two, this the others. */
typedef struct {
    void *stream;
    int32_t phase;
    int64_t samples;
    double idle[2]; /* seconds, by phase */
    double busy;
} Record;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Sample for some seconds, or until the record is closed; 0, or the error of a query.
 *
 * latency: seconds from a launch into an idle GPU until its kernel runs: the stream has work and the GPU still none. */
int sample(int (*query)(void *), volatile Record *record, double latency, double seconds) {
    double last = now(), end = last + seconds;
    uint64_t random = (uint64_t)(last * 1e9) | 1;
    while (last < end && record->phase != CLOSED) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        double pause = PAUSE * (0.5 + (double)(random % 1024) / 1024); /* jittered: steps may be as regular as a clock */
        nanosleep(&(struct timespec){.tv_nsec = (long)(1e9 * pause)}, NULL);
        int phase = record->phase;
        int asks = phase == BETWEEN || phase == IN_STEP;
        int before = asks ? query(record->stream) : DONE;
        for (double until = now() + latency; asks && now() < until;) {}
        int after = asks ? query(record->stream) : DONE;
        double elapsed = now() - last;
        last += elapsed;
        if (before != DONE && before != NOT_READY) return before;
        if (after != DONE && after != NOT_READY) return after;
        if (!asks) continue;
        /* Without work a latency ago is without a kernel now. A sample stands for the time since the one before: a loaded
         * machine, or a launch into a full queue that holds the driver's lock, makes them fewer, not their time less. */
        if (before == DONE || after == DONE) record->idle[phase] += elapsed;
        else record->busy += elapsed;
        record->samples++;
    }
    return 0;
}
