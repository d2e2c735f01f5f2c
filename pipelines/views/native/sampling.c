/* Samples the augmentation parameters of a batch, with the bits of randomness.py and of each operation in reference/.
 *
 * Only the random words that an operation uses are computed, which a counter-based generator allows.
 */

#include <math.h>
#include <stdint.h>

#include "../portable_math.h"

enum { ATTEMPTS = 10 };
enum { CROP = 0, CUTOUT = 10, FLIP = 20, JITTER = 21, GRAYSCALE = 23, BLUR = 24, SOLARIZE = 25, VERTICAL_FLIP = 26 };
enum { QUARTER_TURNS = 27, ROTATE = 28 }; /* Slot of randomness.py */

/* A random box: range of its fraction of the area as start and extent, of its aspect ratio as numbers and as logarithms. */
typedef struct {
    double wanted; /* 0: none */
    double area, area_extent;
    double ratio_low, ratio_high;
    double log_ratio, log_ratio_extent;
} Box;

/* The parts of a ViewSpec that sampling needs; the layout is that of `Spec` in sampling.py. */
typedef struct {
    Box crop, cutout;
    double size, blur_kernel;
    double flip;
    double jitter[4], jitter_p;
    double grayscale;
    double blur, sigma, sigma_extent;
    double solarize;
    double vertical_flip, quarter_turns;
    double angle, angle_extent;
} Spec;

/* Output for V views of N images: [V, N, ...] each. */
typedef struct {
    int64_t *crop;         /* 4 */
    uint8_t *flip;
    int64_t *cutout;       /* 4 */
    uint8_t *jitter_on;
    float *jitter;         /* 4 */
    int64_t *jitter_order; /* 4 */
    uint8_t *gray;
    float *blur_sigma;
    uint8_t *solarize;
    uint8_t *vertical_flip;
    int64_t *quarter_turns;
    float *angle;
} Params;

/* Counter and key of one view of one image. */
typedef struct {
    uint32_t key[2];
    uint32_t epoch;
    uint32_t index[2];
    uint32_t view;
} Place;

static void uniforms(const Place *place, uint32_t block, double u[4]) {
    uint32_t c0 = place->view << 16 | block, c1 = place->epoch, c2 = place->index[0], c3 = place->index[1];
    uint32_t k0 = place->key[0], k1 = place->key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    u[0] = (double)c0 * 0x1p-32;
    u[1] = (double)c1 * 0x1p-32;
    u[2] = (double)c2 * 0x1p-32;
    u[3] = (double)c3 * 0x1p-32;
}

static void write_box(int64_t out[4], double top, double left, double height, double width) {
    out[0] = (int64_t)top;
    out[1] = (int64_t)left;
    out[2] = (int64_t)height;
    out[3] = (int64_t)width;
}

static void random_box(const Box *box, const Place *place, uint32_t slot, double height, double width, int64_t out[4]) {
    for (uint32_t attempt = 0; attempt < ATTEMPTS; attempt++) {
        double u[4];
        uniforms(place, slot + attempt, u);
        double target = (box->area + u[0] * box->area_extent) * (height * width);
        double aspect = exact_exp(box->log_ratio + u[1] * box->log_ratio_extent);
        double w = nearbyint(sqrt(target * aspect)), h = nearbyint(sqrt(target / aspect));
        if (w > 0 && w <= width && h > 0 && h <= height) {
            write_box(out, floor(u[2] * (height - h + 1)), floor(u[3] * (width - w + 1)), h, w);
            return;
        }
    }
    double aspect = width / height, h = height, w = width;
    if (aspect < box->ratio_low) h = fmax(nearbyint(width / box->ratio_low), 1);
    if (aspect > box->ratio_high) w = fmax(nearbyint(height * box->ratio_high), 1);
    write_box(out, floor((height - h) / 2), floor((width - w) / 2), h, w);
}

static void draw_jitter(const Spec *spec, const Place *place, uint8_t *on, float factors[4], int64_t order[4]) {
    double u[4];
    uniforms(place, JITTER, u);
    for (int k = 0; k < 4; k++) {
        double neutral = k < 3 ? 1.0 : 0.0;
        factors[k] = (float)((neutral - spec->jitter[k]) + u[k] * (2 * spec->jitter[k]));
    }
    uniforms(place, JITTER + 1, u);
    *on = u[0] < spec->jitter_p;
    int number = (int)(u[1] * 24), left[4] = {0, 1, 2, 3}; /* the permutations in their lexicographic order */
    for (int turn = 0, choices = 6; turn < 4; turn++) {
        int chosen = number / choices;
        number %= choices;
        order[turn] = left[chosen];
        for (int k = chosen; k < 3 - turn; k++) left[k] = left[k + 1];
        choices /= turn < 3 ? 3 - turn : 1;
    }
}

/* A Bernoulli sample; uses no random number for probability 0. */
static uint8_t happens(double probability, const Place *place, uint32_t slot) {
    double u[4];
    if (probability <= 0) return 0;
    uniforms(place, slot, u);
    return u[0] < probability;
}

/* Sample V views of N images.
 *
 * sizes: [N, 2], height and width. index: [N], of the images in the data set.
 * Returns 0, or 1 if a size is below 1 or an index negative; what is written then means nothing.
 */
int32_t draw(const Spec *specs, int64_t views, const int64_t *sizes, const int64_t *index, int64_t images, uint64_t seed,
             uint32_t epoch, const Params *out) {
    for (int64_t n = 0; n < images; n++)
        if (sizes[2 * n] < 1 || sizes[2 * n + 1] < 1 || index[n] < 0) return 1;
    for (int64_t v = 0; v < views; v++) {
        const Spec *spec = specs + v;
        for (int64_t n = 0; n < images; n++) {
            int64_t job = v * images + n;
            double height = (double)sizes[2 * n], width = (double)sizes[2 * n + 1], u[4];
            Place place = {{(uint32_t)seed, (uint32_t)(seed >> 32)},
                           epoch,
                           {(uint32_t)index[n], (uint32_t)((uint64_t)index[n] >> 32)},
                           (uint32_t)v};
            if (spec->crop.wanted != 0)
                random_box(&spec->crop, &place, CROP, height, width, out->crop + 4 * job);
            else
                write_box(out->crop + 4 * job, 0, 0, height, width);
            if (spec->cutout.wanted != 0)
                random_box(&spec->cutout, &place, CUTOUT, spec->size, spec->size, out->cutout + 4 * job);
            else
                write_box(out->cutout + 4 * job, 0, 0, 0, 0);
            out->flip[job] = happens(spec->flip, &place, FLIP);
            draw_jitter(spec, &place, out->jitter_on + job, out->jitter + 4 * job, out->jitter_order + 4 * job);
            out->gray[job] = happens(spec->grayscale, &place, GRAYSCALE);
            out->blur_sigma[job] = 0;
            if (spec->blur > 0) {
                uniforms(&place, BLUR, u);
                if (u[0] < spec->blur) out->blur_sigma[job] = (float)(spec->sigma + u[1] * spec->sigma_extent);
            }
            out->solarize[job] = happens(spec->solarize, &place, SOLARIZE);
            out->vertical_flip[job] = happens(spec->vertical_flip, &place, VERTICAL_FLIP);
            out->quarter_turns[job] = 0;
            if (spec->quarter_turns > 0) {
                uniforms(&place, QUARTER_TURNS, u);
                if (u[0] < spec->quarter_turns) out->quarter_turns[job] = (int64_t)(u[1] * 4);
            }
            out->angle[job] = (float)spec->angle;
            if (spec->angle_extent > 0) {
                uniforms(&place, ROTATE, u);
                out->angle[job] = (float)(spec->angle + u[0] * spec->angle_extent);
            }
        }
    }
    return 0;
}

/* Whether a box (top, left, height, width) is not empty and inside. */
static int inside(const int64_t box[4], int64_t height, int64_t width) {
    return box[0] >= 0 && box[1] >= 0 && box[2] > 0 && box[3] > 0 && box[2] <= height - box[0] && box[3] <= width - box[1];
}

static int factors_fit(const float factors[4]) {
    for (int k = 0; k < 3; k++)
        if (!(factors[k] >= 0 && isfinite(factors[k]))) return 0;
    return fabsf(factors[3]) <= 0.5f;
}

static int is_order(const int64_t order[4]) {
    int64_t seen = 0;
    for (int turn = 0; turn < 4; turn++) {
        if (order[turn] < 0 || order[turn] > 3) return 0;
        seen |= INT64_C(1) << order[turn];
    }
    return seen == 15;
}

/* Whether parameters fit V views of N images, as `check_params` in sampling.py demands. */
int32_t fit(const Spec *specs, int64_t views, const int64_t *sizes, int64_t images, const Params *params) {
    for (int64_t v = 0; v < views; v++) {
        int64_t size = (int64_t)specs[v].size, reach = (int64_t)specs[v].blur_kernel / 2;
        for (int64_t n = 0; n < images; n++) {
            int64_t job = v * images + n;
            float sigma = params->blur_sigma[job];
            if (!inside(params->crop + 4 * job, sizes[2 * n], sizes[2 * n + 1])) return 0;
            if (params->cutout[4 * job + 2] != 0 && !inside(params->cutout + 4 * job, size, size)) return 0;
            if (!factors_fit(params->jitter + 4 * job) || !is_order(params->jitter_order + 4 * job)) return 0;
            if (params->quarter_turns[job] < 0 || params->quarter_turns[job] > 3) return 0;
            if (!(fabsf(params->angle[job]) <= 360.0f)) return 0;
            if (!(sigma >= 0 && isfinite(sigma)) || (sigma > 0 && reach >= size)) return 0;
        }
    }
    return 1;
}
