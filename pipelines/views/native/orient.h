/* Flips, quarter turns and rotation of a resized view, with the bits of reference/orient.py, which says why so. */

#ifndef ORIENT_H
#define ORIENT_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __FMA__
#include <immintrin.h>
#endif

enum { MIRROR_COLUMNS = 1, MIRROR_ROWS = 2, TRANSPOSE = 4 }; /* rows and columns are exchanged first, then mirrored */
enum { UPRIGHT, NEAREST, BILINEAR, BILINEAR_UNFILLED };      /* how a view is rotated */
enum { BORDER = 2 };                                         /* pixels around a padded view, which are 0 */

typedef struct {
    float cosine, sine; /* over half the side */
    float fill[4];      /* red, green, blue, unused */
    int32_t how;
} Rotation;

/* Where row y of a view [size, pitch] goes: its first pixel, and the step from one pixel to the next. */
static inline int64_t row_start(int32_t orientation, int64_t y, int64_t size, int64_t pitch, int64_t *step) {
    int64_t mirror_x = orientation & MIRROR_COLUMNS, mirror_y = orientation & MIRROR_ROWS;
    if (orientation & TRANSPOSE) {
        *step = mirror_y ? -pitch : pitch;
        return (mirror_y ? (size - 1) * pitch : 0) + (mirror_x ? size - 1 - y : y);
    }
    *step = mirror_x ? -1 : 1;
    return (mirror_y ? size - 1 - y : y) * pitch + (mirror_x ? size - 1 : 0);
}

/* Bytes of a padded view [size + 2 BORDER, size + 2 BORDER, 4] and of the positions of a row. */
static int64_t rotation_bytes(int64_t size) {
    return 4 * (size + 2 * BORDER) * (size + 2 * BORDER) + size * (int64_t)(sizeof(int32_t) + 2 * sizeof(float));
}

/* Write row y of resized pixels into a padded view; the fourth byte says that a pixel is inside. */
static void pad_row(const uint8_t *source, uint8_t *padded, int32_t orientation, int64_t y, int64_t size) {
    int64_t pitch = size + 2 * BORDER, step, at = row_start(orientation, y, size, pitch, &step);
    uint8_t *out = padded + 4 * (BORDER * pitch + BORDER + at);
    for (int64_t x = 0; x < size; x++, out += 4 * step) {
        memcpy(out, source + 3 * x, 3);
        out[3] = 1;
    }
}

typedef uint8_t Bytes4 __attribute__((vector_size(4)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef double Doubles4 __attribute__((vector_size(32)));

static inline Floats4 pixel_at(const uint8_t *at) {
    Bytes4 bytes;
    memcpy(&bytes, at, sizeof bytes);
    return __builtin_convertvector(bytes, Floats4);
}

/* weight * pixel + sum, rounded once; where no instruction does, in float64, in which the product is exact. */
static inline Floats4 multiply_add(float weight, Floats4 pixel, Floats4 sum) {
#ifdef __FMA__
    return (Floats4)_mm_fmadd_ps((__m128)pixel, _mm_set1_ps(weight), (__m128)sum);
#else
    Doubles4 exact = __builtin_convertvector(pixel, Doubles4) * (double)weight + __builtin_convertvector(sum, Doubles4);
    return __builtin_convertvector(exact, Floats4);
#endif
}

static inline float to_pixels(float of_grid, float half) {
    return (float)((double)(of_grid + 1.0f) * (double)half - 0.5);
}

static inline int32_t limit(float at, int32_t low, int32_t high) {
    int32_t whole = (int32_t)at;
    whole = whole < low ? low : whole;
    return whole > high ? high : whole;
}

/* Positions of the pixels of row y in the padded view, and for bilinear their distances from the pixel above and before. */
static inline void find_row(const Rotation *rotation, int32_t how, int64_t y, int64_t size, int32_t *restrict at,
                            float *restrict right, float *restrict below) {
    float half = (float)size * 0.5f, middle = (float)(size - 1) * 0.5f, from_middle = (float)y - middle;
    float across = from_middle * rotation->sine, along = from_middle * rotation->cosine;
    int32_t pitch = (int32_t)size + 2 * BORDER, last = (int32_t)size;
    for (int64_t x = 0; x < size; x++) {
        float off = (float)x - middle;
        float column = to_pixels(off * rotation->cosine - across, half), row = to_pixels(off * rotation->sine + along, half);
        float left = how == NEAREST ? rintf(column) : floorf(column), top = how == NEAREST ? rintf(row) : floorf(row);
        right[x] = column - left;
        below[x] = row - top;
        at[x] = 4 * ((limit(top, -BORDER, last) + BORDER) * pitch + limit(left, -BORDER, last) + BORDER);
    }
}

/* `rotate_row` for one `how`, which the compiler knows in each copy. */
static inline void rotate_row_how(const Rotation *rotation, int32_t how, uint8_t *padded, int64_t y, int64_t size,
                                  float *restrict r, float *restrict g, float *restrict b) {
    int64_t pitch = 4 * (size + 2 * BORDER);
    int32_t *at = (int32_t *)(padded + pitch * (size + 2 * BORDER));
    float *right = (float *)(at + size), *below = right + size;
    Floats4 fill;
    memcpy(&fill, rotation->fill, sizeof fill);
    find_row(rotation, how, y, size, at, right, below);
    for (int64_t x = 0; x < size; x++) {
        const uint8_t *corner = padded + at[x];
        Floats4 pixel = pixel_at(corner);
        if (how == NEAREST) {
            if (corner[3] == 0) pixel = fill;
        } else {
            float above = 1.0f - below[x], before = 1.0f - right[x];
            pixel *= above * before;
            pixel = multiply_add(above * right[x], pixel_at(corner + 4), pixel);
            pixel = multiply_add(below[x] * before, pixel_at(corner + pitch), pixel);
            pixel = multiply_add(below[x] * right[x], pixel_at(corner + pitch + 4), pixel);
            if (how == BILINEAR) pixel = (pixel - fill) * pixel[3] + fill;
        }
        r[x] = pixel[0];
        g[x] = pixel[1];
        b[x] = pixel[2];
    }
    for (int64_t x = 0; x < size; x++) {
        const float unit = (float)(1.0 / 255.0);
        r[x] = (float)(int32_t)rintf(r[x]) * unit;
        g[x] = (float)(int32_t)rintf(g[x]) * unit;
        b[x] = (float)(int32_t)rintf(b[x]) * unit;
    }
}

/* Rotate row y of a padded view, with scratch behind it (rotation_bytes), into rows of the planes in [0, 1]. */
static void rotate_row(const Rotation *rotation, uint8_t *padded, int64_t y, int64_t size, float *r, float *g, float *b) {
    if (rotation->how == NEAREST) rotate_row_how(rotation, NEAREST, padded, y, size, r, g, b);
    if (rotation->how == BILINEAR) rotate_row_how(rotation, BILINEAR, padded, y, size, r, g, b);
    if (rotation->how == BILINEAR_UNFILLED) rotate_row_how(rotation, BILINEAR_UNFILLED, padded, y, size, r, g, b);
}

#endif
