/* Pieces of many files read at once, by threads that end with the call. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

enum { MOST_THREADS = 64 };

/* What is read; the layout is that of `Piece` in together.py. */
typedef struct {
    const char *path; /* NULL: of the open file `descriptor` */
    int64_t descriptor;
    int64_t offset, size;
    uint8_t *into;
    int64_t got; /* bytes that there were of `size`; -1 if the file could not be opened or read */
} Piece;

typedef struct {
    Piece *pieces;
    int64_t count;
    atomic_llong next;
} Work;

static int open_path(const char *path) {
    int file;
    do file = open(path, O_RDONLY | O_CLOEXEC);
    while (file < 0 && errno == EINTR);
    return file;
}

static int64_t read_from(int file, const Piece *piece) {
    int64_t done = 0;
    while (done < piece->size) { /* one call gives at most 2 GiB */
        ssize_t got = pread(file, piece->into + done, (size_t)(piece->size - done), piece->offset + done);
        if (got == 0) break;
        if (got < 0 && errno != EINTR) return -1;
        if (got > 0) done += got;
    }
    return done;
}

static void *read_some(void *argument) {
    Work *work = argument;
    for (long long n; (n = atomic_fetch_add(&work->next, 1)) < work->count;) {
        Piece *piece = work->pieces + n;
        int file = piece->path ? open_path(piece->path) : (int)piece->descriptor;
        piece->got = file < 0 ? -1 : read_from(file, piece);
        if (piece->path && file >= 0) close(file);
    }
    return NULL;
}

/* Read all pieces; the calling thread is one of `threads`. */
void read_pieces(Piece *pieces, int64_t count, int64_t threads) {
    Work work = {.pieces = pieces, .count = count};
    pthread_t others[MOST_THREADS];
    int64_t started = 0;
    sigset_t all, before;
    sigfillset(&all); /* signals are for Python's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started < threads - 1 && started < count - 1 && started < MOST_THREADS)
        if (pthread_create(others + started, NULL, read_some, &work) == 0)
            started++;
        else
            break; /* fewer do it too */
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    read_some(&work);
    for (int64_t n = 0; n < started; n++) pthread_join(others[n], NULL);
}

/* Let the system begin to read files into memory, at most `most` bytes a time; what cannot be opened is left out. */
void will_read(const Piece *pieces, int64_t count, int64_t most) {
#ifdef POSIX_FADV_WILLNEED
    for (int64_t n = 0; n < count; n++) {
        int file = open_path(pieces[n].path);
        if (file < 0) continue;
        for (int64_t at = 0; at < pieces[n].size; at += most)
            posix_fadvise(file, at, pieces[n].size - at < most ? pieces[n].size - at : most, POSIX_FADV_WILLNEED);
        close(file);
    }
#endif
}
