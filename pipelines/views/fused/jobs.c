/* The jobs of a batch as tables, with the bits of `make_jobs_reference` in jobs.py, whose columns these are. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../portable_math.h"

enum { COLUMNS = 27, FACTORS = 4, MOST_TAPS = 4096 };

/* The parts of a ViewSpec that jobs need; the layout is that of `View` in jobs.py. */
typedef struct {
    int64_t size;
    int64_t half; /* taps of the blur on one side, the middle one included */
    float threshold;
} View;

/* A batch of N images and its augmentation parameters for V views. */
typedef struct {
    const int64_t *offset, *row_stride; /* [N] */
    const int64_t *crop;                /* [V, N, 4] */
    const uint8_t *orientation;
    const int64_t *cutout;
    const uint8_t *jitter_on;
    const float *jitter;
    const int64_t *jitter_order;
    const uint8_t *gray;
    const float *blur_sigma;
    const uint8_t *solarize;
} Batch;

/* Total sizes over all jobs. */
typedef struct {
    int64_t rows, views, bounds, weights, floats, blurred;
} Totals;

static int64_t taps(int64_t length, int64_t size) {
    double support = 2.0 * fmax((double)length / (double)size, 1.0);
    return 2 * (int64_t)ceil(support) + 1;
}

/* The taps of a blur as `kernel_half` in reference/blur.py computes them; the distance of the last one that is not 0. */
static int64_t blur_taps(float sigma, int64_t half, float *out) {
    double weight[MOST_TAPS], total, wide = (double)(sigma < (float)1e-3 ? (float)1e-3 : sigma);
    int64_t used = 0, reach = -1;
    for (; used < half; used++) {
        double x = (double)used / wide, power = -0.5 * (x * x);
        if (power < -60) break; /* e**-60 changes no bit of a sum above 1, and makes no tap */
        weight[used] = exact_exp(power);
    }
    total = weight[0];
    for (int64_t k = 1; k < used; k++) total = total + 2.0 * weight[k];
    for (int64_t k = 0; k < used; k++) {
        double share = weight[k] / total;
        out[k] = share < 1e-8 ? 0.0f : (float)share;
        reach += out[k] > 0;
    }
    return reach;
}

/* Make the jobs of images `first` to `first + count - 1` of a batch of N: view after view, image after image.
 *
 * numbers: [V * count, COLUMNS]. reals: [V * count, FACTORS + 1 + half], zeros. blurred: [V * count], filled in part.
 */
void make_jobs(const View *views, int64_t count_of_views, const Batch *batch, int64_t images, int64_t first, int64_t count,
               int64_t half, int64_t *numbers, float *reals, int64_t *blurred, Totals *totals) {
    Totals at = {0, 0, 0, 0, 0, 0};
    int64_t out_of_view = 0;
    for (int64_t v = 0; v < count_of_views; v++) {
        const View *view = views + v;
        int64_t size = view->size, values = size * size * 3;
        for (int64_t n = first; n < first + count; n++) {
            int64_t from = v * images + n, job = v * count + n - first;
            const int64_t *crop = batch->crop + 4 * from, *cutout = batch->cutout + 4 * from;
            const int64_t *order = batch->jitter_order + 4 * from;
            const float *factors = batch->jitter + 4 * from;
            float *real = reals + job * (FACTORS + 1 + half);
            int64_t column_taps = taps(crop[3], size), row_taps = taps(crop[2], size);
            int64_t jitter = 0, reach = -1, here = at.floats;
            for (int k = 0; k < 4; k++) {
                real[k] = factors[k];
                jitter |= (int64_t)(batch->jitter_on[from] && factors[k] != (k < 3 ? 1.0f : 0.0f)) << k;
            }
            real[FACTORS] = view->threshold;
            if (batch->blur_sigma[from] > 0) {
                reach = blur_taps(batch->blur_sigma[from], view->half, real + FACTORS + 1);
                blurred[at.blurred++] = job;
                at.floats += values;
            } else {
                real[FACTORS + 1] = 1.0f; /* what is left of the narrowest blur */
            }
            int64_t row[COLUMNS] = {
                batch->offset[n] + crop[0] * batch->row_stride[n] + crop[1] * 3,
                batch->row_stride[n],
                crop[2],
                crop[3],
                size,
                at.rows,
                at.views,
                at.bounds,
                at.weights,
                column_taps,
                at.weights + column_taps * size,
                row_taps,
                batch->orientation[from],
                cutout[0],
                cutout[1],
                cutout[2],
                cutout[3],
                jitter,
                order[0],
                order[1],
                order[2],
                order[3],
                batch->gray[from],
                batch->solarize[from],
                reach,
                here,
                out_of_view + n * values,
            };
            memcpy(numbers + job * COLUMNS, row, sizeof row);
            at.rows += crop[2] * size * 3;
            at.views += values;
            at.bounds += 4 * size;
            at.weights += (column_taps + row_taps) * size;
        }
        out_of_view += images * values;
    }
    *totals = at;
}
