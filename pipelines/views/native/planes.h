/* Rows of bytes to planes of float32, and planes to pixels of a view's dtype. */

#ifndef PLANES_H
#define PLANES_H

#include <stdint.h>
#include <string.h>

#include "resize.h"

enum { FLOAT32, BFLOAT16, FLOAT16 };

#ifdef __AVX2__
/* Where the bytes of channel c of 16 pixels come from in vector p of the three that hold them: for pixel x, then for all. */
#define PLACE(c, p, x) (3 * (x) + (c)-LINE * (p) >= 0 && 3 * (x) + (c)-LINE * (p) < LINE ? 3 * (x) + (c)-LINE * (p) : -1)
#define FOUR(c, p, x) PLACE(c, p, x), PLACE(c, p, (x) + 1), PLACE(c, p, (x) + 2), PLACE(c, p, (x) + 3)
#define PLACES(c, p) {FOUR(c, p, 0), FOUR(c, p, 4), FOUR(c, p, 8), FOUR(c, p, 12)}
static const int8_t CHANNEL[3][3][LINE] __attribute__((aligned(16))) = {
    {PLACES(0, 0), PLACES(0, 1), PLACES(0, 2)},
    {PLACES(1, 0), PLACES(1, 1), PLACES(1, 2)},
    {PLACES(2, 0), PLACES(2, 1), PLACES(2, 2)},
};
static const int8_t BACKWARDS[LINE] __attribute__((aligned(16))) = {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0};

static inline __m128i shuffled(__m128i bytes, const int8_t *places) {
    return _mm_shuffle_epi8(bytes, _mm_load_si128((const __m128i *)places));
}
#endif

/* Spread a row of pixels over the planes: `step` is 1, -1 for the pixels from right to left, or leads down or up. */
static void load_row(const uint8_t *restrict source, float *restrict r, float *restrict g, float *restrict b, int64_t size,
                     int64_t step) {
    const float unit = (float)(1.0 / 255.0);
    int64_t done = 0; /* pixels of the source */
#ifdef __AVX2__
    const __m256 units = _mm256_set1_ps(unit);
    for (; (step == 1 || step == -1) && done + 16 <= size; done += 16) {
        float *to[3] = {r, g, b};
        __m128i bytes[3];
        for (int part = 0; part < 3; part++)
            bytes[part] = _mm_loadu_si128((const __m128i *)(source + 3 * done + LINE * part));
        for (int c = 0; c < 3; c++) {
            __m128i plane = shuffled(bytes[0], CHANNEL[c][0]);
            plane = _mm_or_si128(plane, shuffled(bytes[1], CHANNEL[c][1]));
            plane = _mm_or_si128(plane, shuffled(bytes[2], CHANNEL[c][2]));
            if (step == -1) plane = shuffled(plane, BACKWARDS);
            float *at = to[c] + (step == 1 ? done : size - 16 - done);
            __m256i low = _mm256_cvtepu8_epi32(plane), high = _mm256_cvtepu8_epi32(_mm_srli_si128(plane, 8));
            _mm256_storeu_ps(at, _mm256_mul_ps(_mm256_cvtepi32_ps(low), units));
            _mm256_storeu_ps(at + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(high), units));
        }
    }
#endif
    if (step != 1 && step != -1)
        for (int64_t x = 0; x < size; x++) {
            r[step * x] = (float)source[3 * x] * unit;
            g[step * x] = (float)source[3 * x + 1] * unit;
            b[step * x] = (float)source[3 * x + 2] * unit;
        }
    else if (step == -1)
        for (int64_t x = 0; x < size - done; x++) {
            const uint8_t *pixel = source + 3 * (size - 1 - x);
            r[x] = (float)pixel[0] * unit;
            g[x] = (float)pixel[1] * unit;
            b[x] = (float)pixel[2] * unit;
        }
    else
        for (int64_t x = done; x < size; x++) {
            r[x] = (float)source[3 * x] * unit;
            g[x] = (float)source[3 * x + 1] * unit;
            b[x] = (float)source[3 * x + 2] * unit;
        }
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16); /* half to even; views are finite */
}

/* Write `count` pixels of planes that are `area` apart as pixels of three values of the dtype. */
static void store(const float *planes, int64_t area, int64_t count, int32_t dtype, void *out) {
    int64_t i = 0;
#ifdef __AVX2__
    for (; dtype == FLOAT32 && i + 8 <= count; i += 8) {
        /* Each plane's eight values go to the places that they have in the three vectors to write. */
        __m256 r = _mm256_permutevar8x32_ps(_mm256_loadu_ps(planes + i), _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5));
        __m256 g = _mm256_permutevar8x32_ps(_mm256_loadu_ps(planes + area + i), _mm256_setr_epi32(5, 0, 3, 6, 1, 4, 7, 2));
        __m256 b = _mm256_permutevar8x32_ps(_mm256_loadu_ps(planes + 2 * area + i), _mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7));
        float *to = (float *)out + 3 * i;
        _mm256_storeu_ps(to, _mm256_blend_ps(_mm256_blend_ps(r, g, 0x92), b, 0x24));
        _mm256_storeu_ps(to + 8, _mm256_blend_ps(_mm256_blend_ps(r, g, 0x24), b, 0x49));
        _mm256_storeu_ps(to + 16, _mm256_blend_ps(_mm256_blend_ps(r, g, 0x49), b, 0x92));
    }
#endif
    for (; i < count; i++) {
        for (int c = 0; c < 3; c++) {
            float value = planes[c * area + i];
            if (dtype == FLOAT32) ((float *)out)[3 * i + c] = value;
            if (dtype == BFLOAT16) ((uint16_t *)out)[3 * i + c] = to_bfloat16(value);
#ifdef __FLT16_MAX__
            if (dtype == FLOAT16) ((_Float16 *)out)[3 * i + c] = (_Float16)value;
#endif
        }
    }
}

#endif
