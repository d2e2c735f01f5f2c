/* Bicubic antialiased resize of RGB bytes in the integer arithmetic of torch's on x86 (fused/resize.py has the source and says why). */

#ifndef RESIZE_H
#define RESIZE_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { ROWS = 4, LINE = 16 }; /* rows resized together along the columns, bytes summed together */

/* How an axis is resized: output i is the sum of the `taps` inputs from first[i], times weights[taps * i ...], >> precision.
 *
 * taps is even. The last inputs may lie behind the end of the axis: their weights are 0.
 */
typedef struct {
    int64_t size, taps;
    int32_t precision;
    int32_t *first;
    int16_t *weights;
} Axis;

static inline double cubic(double x) {
    x = fabs(x);
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
    if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
    return 0.0;
}

/* Maximal inputs per output, rounded up to an even number. */
static int64_t axis_taps(int64_t length, int64_t size) {
    double scale = (double)length / (double)size;
    return 2 * (int64_t)ceil(2.0 * fmax(scale, 1.0)) + 2;
}

/* Bytes of an axis and of the float64 weights from which it is made. */
static int64_t axis_bytes(int64_t length, int64_t size) {
    return size * (axis_taps(length, size) * (int64_t)(sizeof(double) + sizeof(int16_t)) + (int64_t)sizeof(int32_t));
}

/* Make the weights of an axis in `memory` (axis_bytes). */
static Axis make_axis(int64_t length, int64_t size, void *memory) {
    int64_t room = axis_taps(length, size), most = 0;
    double *real = memory;
    Axis axis = {.size = size, .first = (int32_t *)(real + size * room)};
    axis.weights = (int16_t *)(axis.first + size);
    double scale = (double)length / (double)size;
    double reach = 2.0 * fmax(scale, 1.0), shrink = 1.0 / fmax(scale, 1.0), largest = 0.0;
    for (int64_t i = 0; i < size; i++) {
        double center = ((double)i + 0.5) * scale, total = 0.0, *weights = real + i * room;
        int64_t first = (int64_t)(center - reach + 0.5), end = (int64_t)(center + reach + 0.5);
        first = first < 0 ? 0 : first;
        int64_t count = (end > length ? length : end) - first;
        for (int64_t k = 0; k < room; k++) {
            weights[k] = k < count ? cubic(((double)(k + first) - center + 0.5) * shrink) : 0.0;
            total += weights[k];
        }
        for (int64_t k = 0; k < count; k++) {
            weights[k] /= total;
            largest = fmax(largest, weights[k]);
        }
        most = count > most ? count : most;
        axis.first[i] = (int32_t)first;
    }
    for (; axis.precision < 22; axis.precision++) /* the most bits with which the largest weight stays below 2**15 */
        if ((int64_t)(0.5 + largest * (double)(INT64_C(2) << axis.precision)) >= 32768) break;
    double unit = (double)(INT64_C(1) << axis.precision);
    axis.taps = (most + 1) / 2 * 2;
    for (int64_t i = 0; i < size; i++)
        for (int64_t k = 0; k < axis.taps; k++) {
            double weight = real[i * room + k];
            axis.weights[i * axis.taps + k] = (int16_t)(weight * unit + (weight < 0.0 ? -0.5 : 0.5)); /* half away from 0 */
        }
    return axis;
}

/* Sums of weights times LINE bytes. */
#ifdef __AVX2__
typedef struct {
    __m256i low, high;
} Sums;

static inline Sums sums_of(int32_t value) {
    return (Sums){_mm256_set1_epi32(value), _mm256_set1_epi32(value)};
}

/* Add two lines of bytes times their weights. */
static inline void add_lines(Sums *sums, const uint8_t *one, const uint8_t *two, const int16_t *weights) {
    int32_t pair;
    memcpy(&pair, weights, sizeof pair);
    __m256i both = _mm256_set1_epi32(pair);
    __m128i a = _mm_loadu_si128((const __m128i *)one), b = _mm_loadu_si128((const __m128i *)two);
    __m256i low = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), high = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
    sums->low = _mm256_add_epi32(sums->low, _mm256_madd_epi16(low, both));
    sums->high = _mm256_add_epi32(sums->high, _mm256_madd_epi16(high, both));
}

/* The sums >> precision as bytes, saturated. */
static inline void write_line(const Sums *sums, int32_t precision, uint8_t *line) {
    __m128i bits = _mm_cvtsi32_si128(precision);
    __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(sums->low, bits), _mm256_sra_epi32(sums->high, bits));
    words = _mm256_permute4x64_epi64(words, 0xD8); /* packs goes by halves */
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)line, bytes);
}
#else
typedef struct {
    int32_t at[LINE];
} Sums;

static inline Sums sums_of(int32_t value) {
    Sums sums;
    for (int i = 0; i < LINE; i++) sums.at[i] = value;
    return sums;
}

static inline void add_lines(Sums *sums, const uint8_t *one, const uint8_t *two, const int16_t *weights) {
    for (int i = 0; i < LINE; i++) sums->at[i] += one[i] * weights[0] + two[i] * weights[1];
}

static inline void write_line(const Sums *sums, int32_t precision, uint8_t *line) {
    for (int i = 0; i < LINE; i++) {
        int32_t value = sums->at[i] >> precision;
        line[i] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}
#endif

/* Resize ROWS rows [width, 3] along the columns to rows [S, 3], and a byte more each.
 *
 * packed: scratch of LINE * (width + 1) bytes, the last LINE of which are only read.
 */
static void resize_columns(const uint8_t *const rows[ROWS], int64_t width, const Axis *axis, uint8_t *packed,
                           uint8_t *const out[ROWS]) {
    for (int r = 0; r < ROWS; r++) {
        for (int64_t x = 0; x + 1 < width; x++) memcpy(packed + LINE * x + 4 * r, rows[r] + 3 * x, 4);
        memcpy(packed + LINE * (width - 1) + 4 * r, rows[r] + 3 * (width - 1), 3);
    }
    for (int64_t x = 0; x < axis->size; x++) {
        const uint8_t *from = packed + LINE * (int64_t)axis->first[x];
        const int16_t *weights = axis->weights + axis->taps * x;
        Sums sums = sums_of(1 << (axis->precision - 1));
        for (int64_t tap = 0; tap < axis->taps; tap += 2)
            add_lines(&sums, from + LINE * tap, from + LINE * (tap + 1), weights + tap);
        uint8_t pixels[LINE];
        write_line(&sums, axis->precision, pixels);
        for (int r = 0; r < ROWS; r++) memcpy(out[r] + 3 * x, pixels + 4 * r, 4);
    }
}

/* Row y of an image [height + 1, pitch], the last row of which is only read, resized along the rows: its first `bytes`.
 *
 * Up to 2 LINE - 1 bytes more are read behind the image and written behind the row.
 */
static void resize_rows(const uint8_t *image, int64_t pitch, int64_t bytes, const Axis *axis, int64_t y, uint8_t *out) {
    const uint8_t *from = image + pitch * axis->first[y];
    const int16_t *weights = axis->weights + axis->taps * y;
    for (int64_t x = 0; x < bytes; x += 2 * LINE) {
        Sums left = sums_of(1 << (axis->precision - 1)), right = left;
        for (int64_t tap = 0; tap < axis->taps; tap += 2) {
            const uint8_t *one = from + pitch * tap + x, *two = one + pitch;
            add_lines(&left, one, two, weights + tap);
            add_lines(&right, one + LINE, two + LINE, weights + tap);
        }
        write_line(&left, axis->precision, out + x);
        write_line(&right, axis->precision, out + x + LINE);
    }
}

#endif
