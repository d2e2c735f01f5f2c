/* Samples whether a CUDA stream has work. C, because a thread that needs the GIL gets it when the training thread releases it,
 * which is next to its launches: such samples would be biased. */

#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <time.h>

enum { BETWEEN, IN_STEP, OFF, CLOSED };
enum { DONE = 0, NOT_READY = 600 }; /* results of cudaStreamQuery; anything else is an error */

static const double PERIOD = 2e-3; /* mean seconds between two samples */

/* Same layout as `_Record` in idle_sampler.py. Python writes the first two fields, this file the others. */
typedef struct {
    void *stream;
    int32_t phase;
    int64_t samples;
    double idle[2]; /* seconds, by phase */
    double busy;    /* seconds */
} Record;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Samples for `seconds`, or until the record is closed. Returns 0, or the error of a query.
 *
 * latency: seconds from a launch until its kernel runs; the stream has work then, but the GPU is still idle. */
int sample(int (*query)(void *), volatile Record *record, double latency, double seconds) {
    double last = now(), end = last + seconds;
    uint64_t random = (uint64_t)(last * 1e9) | 1;
    while (last < end && record->phase != CLOSED) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        double pause = PERIOD * (0.5 + (double)(random % 1024) / 1024); /* jittered: steps are periodic, too */
        nanosleep(&(struct timespec){.tv_nsec = (long)(1e9 * pause)}, NULL);
        int phase = record->phase;
        int active = phase == BETWEEN || phase == IN_STEP;
        int before = active ? query(record->stream) : DONE;
        for (double until = now() + latency; active && now() < until;) {}
        int after = active ? query(record->stream) : DONE;
        double elapsed = now() - last;
        last += elapsed;
        if (before != DONE && before != NOT_READY) return before;
        if (after != DONE && after != NOT_READY) return after;
        if (!active) continue;
        /* No work one latency ago means no kernel now. A sample is weighted by the time since the one before: a loaded machine,
         * or a launch into a full queue that holds the driver's lock, delays samples but must not lose their time. */
        if (before == DONE || after == DONE) record->idle[phase] += elapsed;
        else record->busy += elapsed;
        record->samples++;
    }
    return 0;
}
