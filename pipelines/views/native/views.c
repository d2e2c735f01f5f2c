/* One view of some images: crop and resize, flips and rotation, cutout, colour jitter, grayscale, blur, solarize, normalise.
 *
 * The operations and their order are those of the modules in pipelines/views/ops in float32, so the values are the reference's bit
 * for bit (built without contraction to fused multiply-add). An image stays in the cache from its bytes to its view.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "orient.h"
#include "planes.h"
#include "resize.h"

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE };

/* Crop and augmentation parameters of one image; the layout is that of `Job` in engine.py. */
typedef struct {
    const uint8_t *crop; /* its first pixel */
    int64_t stride;      /* bytes from one row to the next */
    int32_t height, width;
    int32_t orientation; /* bits of orient.h */
    int32_t cutout[4]; /* top, left, height, width; height 0 makes none */
    int32_t jitter;    /* bit k: operation k is applied */
    int32_t order[4];
    int32_t gray;
    int32_t reach; /* of the blur to one side; -1 without */
    int32_t solarize;
    float factors[4];
    Rotation rotation; /* after the orientation */
} Job;

static const float MEAN[3] = {0.485f, 0.456f, 0.406f};
static const float STD[3] = {0.229f, 0.224f, 0.225f};

static inline float clamp(float x) {
    x = x < 0.0f ? 0.0f : x;
    return x > 1.0f ? 1.0f : x;
}

static inline float luma(float red, float green, float blue) {
    return red * 0.2989f + green * 0.587f + blue * 0.114f;
}

static void brightness(float *restrict plane, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i++) plane[i] = clamp(plane[i] * factor);
}

static void contrast(float *restrict r, float *restrict g, float *restrict b, int64_t area, float factor) {
    int64_t units = 0; /* brightness in units of 2**-24: integers add up exactly in any order */
    for (int64_t i = 0; i < area; i++) units += (int64_t)(int32_t)rintf(luma(r[i], g[i], b[i]) * 16777216.0f);
    float mean = (float)((double)units / ((double)area * 16777216.0));
    float other = mean * (1.0f - factor);
    for (int64_t i = 0; i < area; i++) {
        r[i] = clamp(r[i] * factor + other);
        g[i] = clamp(g[i] * factor + other);
        b[i] = clamp(b[i] * factor + other);
    }
}

static void saturation(float *restrict r, float *restrict g, float *restrict b, int64_t area, float factor) {
    float rest = 1.0f - factor;
    for (int64_t i = 0; i < area; i++) {
        float other = luma(r[i], g[i], b[i]) * rest;
        r[i] = clamp(r[i] * factor + other);
        g[i] = clamp(g[i] * factor + other);
        b[i] = clamp(b[i] * factor + other);
    }
}

static void hue(float *restrict r, float *restrict g, float *restrict b, int64_t area, float shift) {
    float turn = shift * 6.0f;
    for (int64_t i = 0; i < area; i++) {
        float red = r[i], green = g[i], blue = b[i];
        float high = red > green ? red : green, low = red < green ? red : green;
        high = high > blue ? high : blue;
        low = low < blue ? low : blue;
        float chroma = high - low;
        float divisor = chroma == 0.0f ? 1.0f : chroma;
        float distance = high == red ? green - blue : (high == green ? blue - red : red - green);
        float begin = high == red ? 0.0f : (high == green ? 2.0f : 4.0f);
        float angle = distance / divisor + begin + turn;
        angle = angle - floorf(angle * (float)(1.0 / 6.0)) * 6.0f;
        r[i] = high - clamp(2.0f - fabsf(angle - 3.0f)) * chroma;
        g[i] = high - clamp(fabsf(angle - 2.0f) - 1.0f) * chroma;
        b[i] = high - clamp(fabsf(angle - 4.0f) - 1.0f) * chroma;
    }
}

static inline int64_t reflect(int64_t at, int64_t size) {
    at = at < 0 ? -at : at;
    return at > size - 1 ? 2 * (size - 1) - at : at;
}

#ifdef __AVX512F__
enum { WIDE = 16 };
#else
enum { WIDE = 8 };
#endif
enum { LANES = 4 * WIDE, PART = 1024 }; /* values that are summed in registers, and finished together */
typedef float Floats __attribute__((vector_size(4 * WIDE)));

static inline Floats floats(const float *at) {
    Floats values;
    memcpy(&values, at, sizeof values);
    return values;
}

/* Weighted sums of lines: the middle one, then pairs at distance k. */
static inline void weigh(const float *middle, const float *const before[], const float *const behind[], int64_t size,
                         const float *taps, int64_t reach, float *restrict out) {
    int64_t x = 0;
    for (; x + LANES <= size; x += LANES) {
        Floats a = floats(middle + x) * taps[0], b = floats(middle + x + WIDE) * taps[0];
        Floats c = floats(middle + x + 2 * WIDE) * taps[0], d = floats(middle + x + 3 * WIDE) * taps[0];
        for (int64_t k = 1; k <= reach; k++) {
            const float *one = before[k] + x, *two = behind[k] + x;
            a += (floats(one) + floats(two)) * taps[k];
            b += (floats(one + WIDE) + floats(two + WIDE)) * taps[k];
            c += (floats(one + 2 * WIDE) + floats(two + 2 * WIDE)) * taps[k];
            d += (floats(one + 3 * WIDE) + floats(two + 3 * WIDE)) * taps[k];
        }
        memcpy(out + x, &a, sizeof a);
        memcpy(out + x + WIDE, &b, sizeof b);
        memcpy(out + x + 2 * WIDE, &c, sizeof c);
        memcpy(out + x + 3 * WIDE, &d, sizeof d);
    }
    for (; x + WIDE <= size; x += WIDE) {
        Floats a = floats(middle + x) * taps[0];
        for (int64_t k = 1; k <= reach; k++) a += (floats(before[k] + x) + floats(behind[k] + x)) * taps[k];
        memcpy(out + x, &a, sizeof a);
    }
    for (; x < size; x++) {
        float sum = middle[x] * taps[0];
        for (int64_t k = 1; k <= reach; k++) sum += (before[k][x] + behind[k][x]) * taps[k];
        out[x] = sum;
    }
}

/* Blur a plane [size, size] along the rows into `half`, then along the columns back.
 *
 * line: scratch of size + 2 reach values. lines: scratch of 2 * (reach + 1) addresses.
 */
static void blur(float *plane, float *half, float *line, const float **lines, int64_t size, const float *taps,
                 int64_t reach) {
    const float **before = lines, **behind = lines + reach + 1;
    for (int64_t y = 0; y < size; y++) {
        for (int64_t k = 1; k <= reach; k++) {
            before[k] = plane + reflect(y - k, size) * size;
            behind[k] = plane + reflect(y + k, size) * size;
        }
        weigh(plane + y * size, before, behind, size, taps, reach, half + y * size);
    }
    for (int64_t k = 1; k <= reach; k++) {
        before[k] = line + reach - k;
        behind[k] = line + reach + k;
    }
    for (int64_t y = 0; y < size; y++) {
        memcpy(line + reach, half + y * size, size * sizeof(float));
        for (int64_t k = 1; k <= reach; k++) {
            line[reach - k] = line[reach + reflect(-k, size)];
            line[reach + size - 1 + k] = line[reach + reflect(size - 1 + k, size)];
        }
        weigh(line + reach, before, behind, size, taps, reach, plane + y * size);
    }
}

/* Whether this build can write float16. */
int32_t has_float16(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

/* Scratch memory for making a view of any of some crops. */
typedef struct {
    float *planes;       /* [3, size, size] */
    float *half, *line;  /* of the blur: [size, size] and [3, size] */
    const float **lines; /* of the blur: [2, size] */
    uint8_t *row;        /* [size, 3] resized, and 2 LINE more */
    uint8_t *packed;     /* pairs of pixels of ROWS rows of a crop, and of its taps more */
    uint8_t *resized;    /* a crop resized along the columns, and rows for its taps and 2 LINE more */
    void *columns, *rows; /* weights */
    uint8_t *padded;      /* of a rotation: the view, and more */
} Scratch;

static void *part(uintptr_t *end, int64_t bytes) {
    uintptr_t begin = *end;
    *end += (uintptr_t)(bytes + 63) / 64 * 64;
    return (void *)begin;
}

/* Lay the parts out from `memory`; returns how many bytes they take. */
static size_t lay_out(Scratch *scratch, void *memory, int64_t size, int64_t height, int64_t width, int32_t rotates) {
    uintptr_t end = (uintptr_t)memory;
    scratch->planes = part(&end, 3 * size * size * (int64_t)sizeof(float));
    scratch->half = part(&end, size * size * (int64_t)sizeof(float));
    scratch->line = part(&end, 3 * size * (int64_t)sizeof(float));
    scratch->lines = part(&end, 2 * size * (int64_t)sizeof(float *));
    scratch->row = part(&end, 3 * size + 2 * LINE);
    scratch->packed = part(&end, 2 * LINE * (width + axis_taps(width, size)));
    scratch->resized = part(&end, (3 * size + 4) * (height + axis_taps(height, size)) + 2 * LINE);
    scratch->columns = part(&end, axis_bytes(width, size));
    scratch->rows = part(&end, axis_bytes(height, size));
    scratch->padded = part(&end, rotates ? rotation_bytes(size) : 0);
    return end - (uintptr_t)memory;
}

/* Crop, resize, flip and rotate into the planes. */
static void resize(const Job *job, int64_t size, const Scratch *scratch) {
    Axis columns = make_axis(job->width, size, scratch->columns), rows = make_axis(job->height, size, scratch->rows);
    int64_t area = size * size, pitch = 3 * size + 4; /* resize_columns */
    for (int64_t y = 0; y < job->height; y += ROWS) {
        const uint8_t *from[ROWS];
        uint8_t *to[ROWS];
        for (int r = 0; r < ROWS; r++) {
            int64_t at = y + r < job->height ? y + r : job->height - 1; /* the last row may be repeated */
            from[r] = job->crop + job->stride * at;
            to[r] = scratch->resized + pitch * at;
            if (y + r + ROWS < job->height) /* the rows are short and far apart: the processor fetches them late */
                for (int64_t x = 0; x < 3 * job->width; x += 64) __builtin_prefetch(from[r] + job->stride * ROWS + x);
        }
        resize_columns(from, job->width, &columns, scratch->packed, to);
    }
    float *planes = scratch->planes;
    for (int64_t y = 0; y < size; y++) {
        resize_rows(scratch->resized, pitch, 3 * size, &rows, y, scratch->row);
        if (job->rotation.how != UPRIGHT) {
            pad_row(scratch->row, scratch->padded, job->orientation, y, size);
            continue;
        }
        int64_t step, at = row_start(job->orientation, y, size, size, &step);
        at -= step == -1 ? size - 1 : 0;
        load_row(scratch->row, planes + at, planes + area + at, planes + 2 * area + at, size, step);
    }
    for (int64_t y = 0; job->rotation.how != UPRIGHT && y < size; y++) {
        float *row = planes + y * size;
        rotate_row(&job->rotation, scratch->padded, y, size, row, row + area, row + 2 * area);
    }
}

static void make_view(const Job *job, const float *taps, float threshold, int64_t size, int32_t dtype,
                      const Scratch *scratch, void *out) {
    int64_t area = size * size;
    float *planes = scratch->planes, *r = planes, *g = planes + area, *b = planes + 2 * area;
    resize(job, size, scratch);
    for (int64_t y = job->cutout[0]; y < job->cutout[0] + job->cutout[2]; y++)
        for (int c = 0; c < 3; c++)
            for (int64_t x = job->cutout[1]; x < job->cutout[1] + job->cutout[3]; x++)
                planes[c * area + y * size + x] = MEAN[c];
    for (int turn = 0; turn < 4; turn++) {
        int32_t operation = job->order[turn];
        float factor = job->factors[operation];
        if (!(job->jitter >> operation & 1)) continue;
        if (operation == BRIGHTNESS) brightness(planes, 3 * area, factor);
        if (operation == CONTRAST) contrast(r, g, b, area, factor);
        if (operation == SATURATION) saturation(r, g, b, area, factor);
        if (operation == HUE) hue(r, g, b, area, factor);
    }
    if (job->gray)
        for (int64_t i = 0; i < area; i++) r[i] = luma(r[i], g[i], b[i]);
    int different = job->gray ? 1 : 3; /* planes; those of a gray view are equal */
    if (job->reach >= 0)
        for (int c = 0; c < different; c++)
            blur(planes + c * area, scratch->half, scratch->line, scratch->lines, size, taps, job->reach);
    for (int c = different; c < 3; c++) memcpy(planes + c * area, planes, area * sizeof(float));
    for (int64_t at = 0, value = dtype == FLOAT32 ? 4 : 2; at < area; at += PART) { /* in the nearest cache */
        int64_t count = area - at < PART ? area - at : PART;
        for (int c = 0; c < 3; c++) {
            float *plane = planes + c * area + at;
            if (job->solarize)
                for (int64_t i = 0; i < count; i++) plane[i] = plane[i] >= threshold ? 1.0f - plane[i] : plane[i];
            for (int64_t i = 0; i < count; i++) plane[i] = (plane[i] - MEAN[c]) / STD[c];
        }
        store(planes + at, area, count, dtype, (uint8_t *)out + 3 * value * at);
    }
}

/* Make the views of images `begin`, `begin + step`, ... of `images`.
 *
 * jobs: [images]. taps: of the blurs, the middle one first, [images, tap_count]. out: [images, size, size, 3] of the dtype.
 * Returns 0, or 1 if there is no memory.
 */
int32_t make_views(const Job *jobs, int64_t images, int64_t begin, int64_t step, const float *taps, int64_t tap_count,
                   float threshold, int64_t size, int32_t dtype, void *out) {
    int64_t height = 1, width = 1, bytes = 3 * size * size * (dtype == FLOAT32 ? 4 : 2);
    int32_t rotates = 0;
    for (int64_t n = begin; n < images; n += step) {
        rotates |= jobs[n].rotation.how != UPRIGHT;
        height = jobs[n].height > height ? jobs[n].height : height;
        width = jobs[n].width > width ? jobs[n].width : width;
    }
    Scratch scratch;
    void *memory = malloc(lay_out(&scratch, NULL, size, height, width, rotates));
    if (memory == NULL) return 1;
    lay_out(&scratch, memory, size, height, width, rotates);
    if (rotates) memset(scratch.padded, 0, rotation_bytes(size)); /* the border stays 0 */
    for (int64_t n = begin; n < images; n += step)
        make_view(jobs + n, taps + tap_count * n, threshold, size, dtype, &scratch, (uint8_t *)out + bytes * n);
    free(memory);
    return 0;
}
