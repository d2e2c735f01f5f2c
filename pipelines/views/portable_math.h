/* e**x with the bits of portable_math.py, operation for operation (build without contraction to fused multiply-add). */

#ifndef PORTABLE_MATH_H
#define PORTABLE_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static const double LN2_HIGH = 0x1.62e42ff000000p-1, LN2_LOW = -0x1.718432a1b0e26p-35;
static const double TAYLOR[14] = {
    1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0,
    1.0 / 720.0,        1.0 / 120.0,       1.0 / 24.0,       1.0 / 6.0,       1.0 / 2.0,      1.0,           1.0};

static inline double exact_exp(double x) {
    x = x < -700.0 ? -700.0 : x;
    double k = nearbyint(x * 1.4426950408889634);
    double r = (x - k * LN2_HIGH) - k * LN2_LOW;
    double result = TAYLOR[0];
    for (int i = 1; i < 14; i++) result = result * r + TAYLOR[i];
    int64_t bits = ((int64_t)k + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return result * power;
}

#endif
