/* Reads ranges of many files on threads that end with the call. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../on_threads.h"

/* Same layout as _REQUEST in batch_read.py. */
typedef struct {
    const char *path; /* NULL: read the open file `descriptor` */
    int64_t descriptor;
    int64_t offset, size;
    uint8_t *buffer;
    int64_t count; /* bytes read, fewer than `size` at the end of the file; -1 if opening or reading failed */
} Request;

typedef struct {
    Request *requests;
    int64_t count;
    atomic_llong next;
} Queue;

/* Open a regular file; the data of a pipe or a device may never come, so those fail. */
static int open_path(const char *path) {
    int file;
    struct stat status;
    do file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    while (file < 0 && errno == EINTR);
    if (file >= 0 && (fstat(file, &status) != 0 || !S_ISREG(status.st_mode))) {
        close(file);
        return -1;
    }
    return file;
}

static int64_t read_range(int file, const Request *request) {
    int64_t done = 0;
    while (done < request->size) { /* one call reads at most 2 GiB */
        ssize_t got = pread(file, request->buffer + done, (size_t)(request->size - done), request->offset + done);
        if (got == 0) break;
        if (got < 0 && errno != EINTR) return -1;
        if (got > 0) done += got;
    }
    return done;
}

static void *work(void *argument) {
    Queue *queue = argument;
    for (long long n; (n = atomic_fetch_add(&queue->next, 1)) < queue->count;) {
        Request *request = queue->requests + n;
        int file = request->path ? open_path(request->path) : (int)request->descriptor;
        request->count = file < 0 ? -1 : read_range(file, request);
        if (request->path && file >= 0) close(file);
    }
    return NULL;
}

/* Serve all requests; the calling thread is one of `threads`. */
void read_requests(Request *requests, int64_t count, int64_t threads) {
    Queue queue = {.requests = requests, .count = count};
    on_threads(work, &queue, count, threads);
}

/* Start reading whole files into the page cache, at most `limit` bytes per call; files that cannot be opened are skipped. */
void advise(const Request *requests, int64_t count, int64_t limit) {
#ifdef POSIX_FADV_WILLNEED
    for (int64_t n = 0; n < count; n++) {
        int file = open_path(requests[n].path);
        if (file < 0) continue;
        for (int64_t at = 0; at < requests[n].size; at += limit) {
            int64_t left = requests[n].size - at;
            posix_fadvise(file, at, left < limit ? left : limit, POSIX_FADV_WILLNEED);
        }
        close(file);
    }
#endif
}
