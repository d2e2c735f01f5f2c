/* Everything behind the resize, for one view of one image: flip, cutout, colour jitter, grayscale, blur, solarize, normalise.
 *
 * The operations and their order are those of the modules in pipelines/views/ops in float32, so the values are the reference's bit
 * for bit (built without contraction to fused multiply-add). An image stays in the cache from its bytes to its view.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE };
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* The decisions for one image; the layout is that of `Job` in engine.py. */
typedef struct {
    int32_t flip;
    int32_t cutout[4]; /* top, left, height, width; height 0 makes none */
    int32_t jitter;    /* bit k: operation k is applied */
    int32_t order[4];
    int32_t gray;
    int32_t reach; /* of the blur to one side; -1 without */
    int32_t solarize;
    float factors[4];
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
    int64_t units = 0; /* brightness in units of 2**-24: whole numbers add up exactly in any order */
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
        float if_red = (green - blue) / divisor;
        float if_green = (blue - red) / divisor + 2.0f;
        float if_blue = (red - green) / divisor + 4.0f;
        float angle = high == red ? if_red : (high == green ? if_green : if_blue);
        angle = angle + turn;
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

/* Add to `sum` the values on both sides at a distance, times their common tap. */
static inline void add_pair(float *restrict sum, const float *before, const float *behind, float tap, int64_t count) {
    for (int64_t x = 0; x < count; x++) sum[x] += (before[x] + behind[x]) * tap;
}

static void scale(float *restrict sum, const float *restrict line, float tap, int64_t count) {
    for (int64_t x = 0; x < count; x++) sum[x] = line[x] * tap;
}

/* Blur a plane [size, size] along the rows into `half`, then along the columns back; `line` holds size + 2 reach values. */
static void blur(float *plane, float *half, float *line, int64_t size, const float *taps, int64_t reach) {
    for (int64_t y = 0; y < size; y++) {
        float *out = half + y * size;
        scale(out, plane + y * size, taps[0], size);
        for (int64_t k = 1; k <= reach; k++)
            add_pair(out, plane + reflect(y - k, size) * size, plane + reflect(y + k, size) * size, taps[k], size);
    }
    for (int64_t y = 0; y < size; y++) {
        memcpy(line + reach, half + y * size, size * sizeof(float));
        for (int64_t k = 1; k <= reach; k++) {
            line[reach - k] = line[reach + reflect(-k, size)];
            line[reach + size - 1 + k] = line[reach + reflect(size - 1 + k, size)];
        }
        float *out = plane + y * size;
        scale(out, line + reach, taps[0], size);
        for (int64_t k = 1; k <= reach; k++) add_pair(out, line + reach - k, line + reach + k, taps[k], size);
    }
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16); /* half to even; views are finite */
}

static void store(const float *planes, int64_t area, int32_t dtype, void *out) {
    for (int64_t i = 0; i < area; i++) {
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

/* Whether this build can write float16. */
int32_t has_float16(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

/* Spread a row of pixels over the planes, from the left or from the right. */
static void load_row(const uint8_t *restrict source, float *restrict r, float *restrict g, float *restrict b, int64_t size,
                     int32_t flip) {
    const float unit = (float)(1.0 / 255.0);
    if (flip)
        for (int64_t x = 0; x < size; x++) {
            const uint8_t *pixel = source + 3 * (size - 1 - x);
            r[x] = (float)pixel[0] * unit;
            g[x] = (float)pixel[1] * unit;
            b[x] = (float)pixel[2] * unit;
        }
    else
        for (int64_t x = 0; x < size; x++) {
            r[x] = (float)source[3 * x] * unit;
            g[x] = (float)source[3 * x + 1] * unit;
            b[x] = (float)source[3 * x + 2] * unit;
        }
}

/* Make a view from a resized image [size, size, 3].
 *
 * taps: of the blur, the middle one first. planes: scratch of 4 size * size + 3 size floats.
 * out: [size, size, 3] of the dtype.
 */
void make_view(const uint8_t *pixels, const Job *job, const float *taps, float threshold, int64_t size, int32_t dtype,
               float *planes, void *out) {
    int64_t area = size * size;
    float *r = planes, *g = planes + area, *b = planes + 2 * area, *half = planes + 3 * area, *line = half + area;
    for (int64_t y = 0; y < size; y++)
        load_row(pixels + 3 * y * size, r + y * size, g + y * size, b + y * size, size, job->flip);
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
    if (job->gray) {
        for (int64_t i = 0; i < area; i++) r[i] = luma(r[i], g[i], b[i]);
        memcpy(g, r, area * sizeof(float));
        memcpy(b, r, area * sizeof(float));
    }
    if (job->reach >= 0)
        for (int c = 0; c < 3; c++)
            blur(planes + c * area, half, line, size, taps, job->reach);
    for (int c = 0; c < 3; c++) {
        float *plane = planes + c * area;
        if (job->solarize)
            for (int64_t i = 0; i < area; i++) plane[i] = plane[i] >= threshold ? 1.0f - plane[i] : plane[i];
        for (int64_t i = 0; i < area; i++) plane[i] = (plane[i] - MEAN[c]) / STD[c];
    }
    store(planes, area, dtype, out);
}
