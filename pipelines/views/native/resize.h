/* Bicubic antialiased resize of RGB bytes in the integer arithmetic of torch's on x86 (fused/resize.py has the source and says why). */

#ifndef RESIZE_H
#define RESIZE_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { ROWS = 4, LINE = 16 }; /* rows resized together along the columns; their bytes of one pixel, with one to spare */

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

/* How sums become bytes: added up from half a unit, >> precision, saturated. All integers, so the order does not matter. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
typedef __m512i Sums; /* of LINE bytes, in their order */

static inline Sums sums_of(int32_t value) { return _mm512_set1_epi32(value); }

/* Add LINE pairs of bytes, each times its weights. */
static inline Sums add_pairs(Sums sums, __m256i pairs, const int16_t *weights) {
    int32_t pair;
    memcpy(&pair, weights, sizeof pair);
    return _mm512_dpwssd_epi32(sums, _mm512_cvtepu8_epi16(pairs), _mm512_set1_epi32(pair));
}

static inline __m128i bytes_of(Sums sums, int32_t precision) {
    sums = _mm512_sra_epi32(sums, _mm_cvtsi32_si128(precision));
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(sums, _mm512_setzero_si512()));
}
#elif defined(__AVX2__)
typedef struct {
    __m256i low, high;
} Sums;

static inline Sums sums_of(int32_t value) {
    return (Sums){_mm256_set1_epi32(value), _mm256_set1_epi32(value)};
}

static inline Sums add_pairs(Sums sums, __m256i pairs, const int16_t *weights) {
    int32_t pair;
    memcpy(&pair, weights, sizeof pair);
    __m256i both = _mm256_set1_epi32(pair), low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(pairs));
    __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(pairs, 1));
    sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(low, both));
    sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(high, both));
    return sums;
}

static inline __m128i bytes_of(Sums sums, int32_t precision) {
    __m128i bits = _mm_cvtsi32_si128(precision);
    __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(sums.low, bits), _mm256_sra_epi32(sums.high, bits));
    words = _mm256_permute4x64_epi64(words, 0xD8); /* packs goes by halves */
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#endif

static inline uint8_t byte_of(int32_t sum, int32_t precision) {
    int32_t value = sum >> precision;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* Pixels x and x + 1 of ROWS rows [width, 3] byte by byte in pairs, for each x: [width, ROWS, 4, 2]; the fourth channel is 0. */
static void pack_rows(const uint8_t *const rows[ROWS], int64_t width, uint8_t *packed) {
    int64_t x = 0;
#ifdef __AVX2__
    const __m128i first = _mm_setr_epi8(0, 3, 1, 4, 2, 5, -1, -1, 3, 6, 4, 7, 5, 8, -1, -1);
    const __m128i later = _mm_setr_epi8(6, 9, 7, 10, 8, 11, -1, -1, 9, 12, 10, 13, 11, 14, -1, -1);
    for (; x + 6 <= width; x += 4) { /* 16 bytes are read, 15 of them used */
        __m128i low[ROWS], high[ROWS];
        for (int r = 0; r < ROWS; r++) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)(rows[r] + 3 * x));
            low[r] = _mm_shuffle_epi8(bytes, first);
            high[r] = _mm_shuffle_epi8(bytes, later);
        }
        __m128i *to = (__m128i *)(packed + 2 * LINE * x);
        for (int half = 0; half < 2; half++, to++) {
            const int r = 2 * half;
            _mm_storeu_si128(to, _mm_unpacklo_epi64(low[r], low[r + 1]));
            _mm_storeu_si128(to + 2, _mm_unpackhi_epi64(low[r], low[r + 1]));
            _mm_storeu_si128(to + 4, _mm_unpacklo_epi64(high[r], high[r + 1]));
            _mm_storeu_si128(to + 6, _mm_unpackhi_epi64(high[r], high[r + 1]));
        }
    }
#endif
    for (; x < width; x++)
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *pixel = rows[r] + 3 * x, *next = x + 1 < width ? pixel + 3 : pixel;
            uint8_t *to = packed + 2 * LINE * x + 8 * r;
            for (int c = 0; c < 3; c++) {
                to[2 * c] = pixel[c];
                to[2 * c + 1] = next[c];
            }
            to[6] = to[7] = 0;
        }
}

/* A pixel of ROWS rows, [ROWS, 4], from the pixels at the taps, [taps, ROWS, 4, 2]. */
#ifdef __AVX2__
static inline __m128i column(const uint8_t *packed, const Axis *axis, int64_t x) {
    const uint8_t *from = packed + 2 * LINE * (int64_t)axis->first[x];
    const int16_t *weights = axis->weights + axis->taps * x;
    Sums sums = sums_of(1 << (axis->precision - 1));
    for (int64_t tap = 0; tap < axis->taps; tap += 2)
        sums = add_pairs(sums, _mm256_loadu_si256((const __m256i *)(from + 2 * LINE * tap)), weights + tap);
    return bytes_of(sums, axis->precision);
}
#endif

/* Resize ROWS rows [width, 3] along the columns to rows [S, 3], and 4 bytes more each.
 *
 * packed: scratch of 2 LINE bytes for each pixel and each tap, the latter of which are only read.
 */
static void resize_columns(const uint8_t *const rows[ROWS], int64_t width, const Axis *axis, uint8_t *packed,
                           uint8_t *const out[ROWS]) {
    pack_rows(rows, width, packed);
    int64_t x = 0;
#ifdef __AVX2__
    const __m128i dense = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    for (; x + 4 <= axis->size; x += 4) {
        __m128i a = column(packed, axis, x), b = column(packed, axis, x + 1);
        __m128i c = column(packed, axis, x + 2), d = column(packed, axis, x + 3);
        __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d); /* rows 0 and 1 */
        __m128i row[ROWS] = {_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd)};
        ab = _mm_unpackhi_epi32(a, b), cd = _mm_unpackhi_epi32(c, d);
        row[2] = _mm_unpacklo_epi64(ab, cd), row[3] = _mm_unpackhi_epi64(ab, cd);
        for (int r = 0; r < ROWS; r++) _mm_storeu_si128((__m128i *)(out[r] + 3 * x), _mm_shuffle_epi8(row[r], dense));
    }
#endif
    for (; x < axis->size; x++) {
        const uint8_t *from = packed + 2 * LINE * (int64_t)axis->first[x];
        const int16_t *weights = axis->weights + axis->taps * x;
        int32_t sums[LINE];
        for (int i = 0; i < LINE; i++) sums[i] = 1 << (axis->precision - 1);
        for (int64_t tap = 0; tap < axis->taps; tap += 2)
            for (int i = 0; i < LINE; i++)
                sums[i] += from[2 * LINE * tap + 2 * i] * weights[tap] + from[2 * LINE * tap + 2 * i + 1] * weights[tap + 1];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 3; c++) {
                out[r][3 * x + c] = byte_of(sums[4 * r + c], axis->precision);
            }
    }
}

/* Row y of an image of rows of `pitch` bytes resized along the rows: its first `bytes`.
 *
 * Up to 2 LINE - 1 bytes and a row more are read behind the image, and as many bytes written behind the row.
 */
static void resize_rows(const uint8_t *image, int64_t pitch, int64_t bytes, const Axis *axis, int64_t y, uint8_t *out) {
    const uint8_t *from = image + pitch * axis->first[y];
    const int16_t *weights = axis->weights + axis->taps * y;
    const int32_t half = 1 << (axis->precision - 1);
    for (int64_t x = 0; x < bytes; x += 2 * LINE) {
#ifdef __AVX2__
        Sums even = sums_of(half), odd = even; /* eights of bytes */
        for (int64_t tap = 0; tap < axis->taps; tap += 2) {
            const uint8_t *one = from + pitch * tap + x;
            __m256i a = _mm256_loadu_si256((const __m256i *)one), b = _mm256_loadu_si256((const __m256i *)(one + pitch));
            even = add_pairs(even, _mm256_unpacklo_epi8(a, b), weights + tap);
            odd = add_pairs(odd, _mm256_unpackhi_epi8(a, b), weights + tap);
        }
        __m128i left = bytes_of(even, axis->precision), right = bytes_of(odd, axis->precision);
        _mm_storeu_si128((__m128i *)(out + x), _mm_unpacklo_epi64(left, right));
        _mm_storeu_si128((__m128i *)(out + x + LINE), _mm_unpackhi_epi64(left, right));
#else
        int32_t sums[2 * LINE];
        for (int i = 0; i < 2 * LINE; i++) sums[i] = half;
        for (int64_t tap = 0; tap < axis->taps; tap += 2) {
            const uint8_t *one = from + pitch * tap + x, *two = one + pitch;
            for (int i = 0; i < 2 * LINE; i++) sums[i] += one[i] * weights[tap] + two[i] * weights[tap + 1];
        }
        for (int i = 0; i < 2 * LINE; i++) out[x + i] = byte_of(sums[i], axis->precision);
#endif
    }
}

#endif
