/* A fake device: does what is launched one after the other in real time, and counts its idle time exactly. */

#define _POSIX_C_SOURCE 200809L
#include <time.h>

/* Times in seconds; the layout is that of `_State` in fake_device.py. */
typedef struct {
    double latency; /* from a launch until the work begins */
    double empty;   /* when all work is done */
    double idle;    /* idle time before that */
    int error;      /* result of queries if not 0 */
} Device;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

void launch(volatile Device *device, double seconds) {
    double begin = now() + device->latency, empty = device->empty;
    if (begin > empty) device->idle += begin - empty;
    device->empty = (begin > empty ? begin : empty) + seconds;
}

double idle(volatile Device *device) {
    double since = now() - device->empty;
    return device->idle + (since > 0.0 ? since : 0.0);
}

int query(volatile Device *device) {
    if (device->error) return device->error;
    return now() < device->empty ? 600 : 0;
}

/* A busy host. */
void work(double seconds) {
    for (double end = now() + seconds; now() < end;) {}
}
