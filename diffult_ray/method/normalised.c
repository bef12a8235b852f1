/* Group norms, with the SiLU and the dropout behind them or without, of images in channels-last, and their gradients.

   Images are [n, pixels, channels], channels a multiple of 16: float, or bf16 if they are `narrow`. All else is float.
   A thread has an image at a time, which its cache holds from one pass to the next. */

#include "lanes.h"

typedef short halves __attribute__((vector_size(32)));
typedef short halves_anywhere __attribute__((vector_size(32), aligned(2)));

INLINE lanes least(lanes a, lanes b)
{
    whole first = a < b;
    return (lanes)((first & (whole)a) | (~first & (whole)b));
}

/* e^x = 2^k e^r with |r| <= ln(2) / 2, by the power series of e^r: within 2e-7 of it; 0 below -87. */
INLINE lanes power_of_e(lanes x)
{
    const float rounds = 12582912; /* 1.5 * 2^23: no room for a fraction beside it */
    lanes k = (x * 1.44269504f + rounds) - rounds;
    lanes r = x - k * 0.693359375f + k * 2.12194440e-4f;
    lanes sum = (lanes){0} + 1 / 5040.0f;
    sum = sum * r + 1 / 720.0f;
    sum = sum * r + 1 / 120.0f;
    sum = sum * r + 1 / 24.0f;
    sum = sum * r + 1 / 6.0f;
    sum = sum * r + 0.5f;
    sum = sum * r + 1;
    sum = sum * r + 1;
    whole exponent = __builtin_convertvector(k, whole) + 127;
    return sum * (lanes)((exponent << 23) & (exponent > 0));
}

INLINE lanes sigmoid(lanes z) { return 1 / (1 + power_of_e(least(-z, (lanes){0} + 87))); }

/* Each group's mean and the inverse of its standard deviation, of x [pixels, channels] from its number `first` on. */
INLINE void moments(
    const void *x, size_t first, float *mean, float *inverse, float *sums, size_t pixels, size_t channels,
    size_t groups, float eps, int narrow)
{
    size_t each = channels / groups;
    float centre[channels];
    for (int second = 0; second < 2; second++) {
        for (size_t c = 0; c < channels; c++) {
            centre[c] = second ? mean[c / each] : 0;
            sums[c] = 0;
        }
        for (size_t p = 0; p < pixels; p++)
            for (size_t c = 0; c < channels; c += LANES) {
                lanes d = number(x, first + p * channels + c, narrow) - at(centre + c);
                put(sums + c, at(sums + c) + (second ? d * d : d));
            }
        for (size_t g = 0; g < groups; g++) {
            double total = 0;
            for (size_t c = g * each; c < (g + 1) * each; c++)
                total += sums[c];
            if (second)
                inverse[g] = 1 / __builtin_sqrt(total / (pixels * each) + eps);
            else
                mean[g] = total / (pixels * each);
        }
    }
}

/* What of a group norm is one factor and one term a channel. */
static void affine(
    const float *weight, const float *bias, const float *mean, const float *inverse, float *scale, float *shift,
    size_t channels, size_t groups)
{
    for (size_t c = 0; c < channels; c++) {
        size_t g = c / (channels / groups);
        scale[c] = weight[c] * inverse[g];
        shift[c] = bias[c] - mean[g] * scale[c];
    }
}

/* From random bits [n, channels, pixels] to which of 16 channels are kept, as they reach `least`, a bit each: [n,
   pixels, channels / 16]. Pixels are a multiple of 16. */
void kept(const short *bits, unsigned short *words, short least, size_t n, size_t pixels, size_t channels)
{
    EACH (k, n, (size_t)omp_get_max_threads())
        for (size_t c = 0; c < channels; c += LANES)
            for (size_t p = 0; p < pixels; p += LANES) {
                halves found = {0};
                for (size_t i = 0; i < LANES; i++) {
                    halves these = *(const halves_anywhere *)(bits + (k * channels + c + i) * pixels + p);
                    found |= (these >= least) & (short)(1 << i);
                }
                for (size_t i = 0; i < LANES; i++)
                    words[((k * pixels + p + i) * channels + c) / LANES] = found[i];
            }
}

/* x times `by` where a bit of the word is set, else 0. */
INLINE lanes times(lanes x, unsigned short word, float by)
{
    const whole bits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (lanes)((whole)(x * by) & ((word & bits) != 0));
}

/* `group_norm` of the k-th image. */
INLINE void image_activated(
    const void *x, const float *weight, const float *bias, const unsigned short *words, float by,
    void *y, float *mean, float *inverse, size_t k, size_t pixels, size_t channels, size_t groups, float eps,
    int silu, int narrow)
{
    size_t first = k * pixels * channels;
    float scale[channels], shift[channels];
    moments(x, first, mean + k * groups, inverse + k * groups, scale, pixels, channels, groups, eps, narrow);
    affine(weight, bias, mean + k * groups, inverse + k * groups, scale, shift, channels, groups);
    for (size_t i = first; i < first + pixels * channels; i += channels)
        for (size_t c = 0; c < channels; c += LANES) {
            lanes z = number(x, i + c, narrow) * at(scale + c) + at(shift + c);
            lanes active = silu ? z * sigmoid(z) : z;
            if (words)
                active = times(active, words[(i + c) / LANES], by);
            store(y, i + c, active, narrow);
        }
}

/* y = dropout(silu(group_norm(x))), or without the SiLU, and the moments [n, groups] of x. What is kept, as words from
   `kept`, is multiplied by `by`; without words there is no dropout. */
void group_norm(
    const void *x, const float *weight, const float *bias, const unsigned short *words, float by,
    void *y, float *mean, float *inverse, size_t n, size_t pixels, size_t channels, size_t groups, float eps,
    int silu, int narrow)
{
    EACH (k, n, (size_t)omp_get_max_threads())
        if (narrow)
            image_activated(x, weight, bias, words, by, y, mean, inverse, k, pixels, channels, groups, eps, silu, 1);
        else
            image_activated(x, weight, bias, words, by, y, mean, inverse, k, pixels, channels, groups, eps, silu, 0);
}

/* `group_norm_backward` of the k-th image, whose moments these are. What goes back through the SiLU is kept where x's
   gradient will be, and so is rounded to bf16 before that is, if they are narrow. */
INLINE void image_gradient(
    const void *grad, const void *x, const float *weight, const float *bias, const unsigned short *words, float by,
    const float *centre, const float *rate, void *for_x, float *by_weight, float *by_bias,
    size_t k, size_t pixels, size_t channels, size_t groups, int silu, int narrow)
{
    size_t each = channels / groups, first = k * pixels * channels, last = first + pixels * channels;
    float scale[channels], shift[channels], factor[channels], middle[channels];
    affine(weight, bias, centre, rate, scale, shift, channels, groups);
    for (size_t c = 0; c < channels; c++) {
        middle[c] = centre[c / each];
        by_weight[c] = by_bias[c] = 0;
    }
    for (size_t i = first; i < last; i += channels)
        for (size_t c = 0; c < channels; c += LANES) {
            lanes v = number(x, i + c, narrow), d = number(grad, i + c, narrow);
            if (silu) {
                lanes z = v * at(scale + c) + at(shift + c), s = sigmoid(z);
                d = d * s * (1 + z * (1 - s));
            }
            if (words)
                d = times(d, words[(i + c) / LANES], by);
            store(for_x, i + c, d, narrow);
            put(by_bias + c, at(by_bias + c) + d);
            put(by_weight + c, at(by_weight + c) + d * (v - at(middle + c)));
        }
    for (size_t g = 0; g < groups; g++) {
        double sum = 0, moment = 0, count = pixels * each;
        for (size_t c = g * each; c < (g + 1) * each; c++) {
            sum += by_bias[c] * weight[c];
            moment += by_weight[c] * weight[c];
            by_weight[c] *= rate[g];
        }
        double r = rate[g], slope = -moment * r * r * r / count;
        for (size_t c = g * each; c < (g + 1) * each; c++) {
            factor[c] = slope;
            shift[c] = -sum * r / count - slope * centre[g];
        }
    }
    for (size_t i = first; i < last; i += channels)
        for (size_t c = 0; c < channels; c += LANES) {
            lanes d = number(for_x, i + c, narrow), v = number(x, i + c, narrow);
            store(for_x, i + c, d * at(scale + c) + v * at(factor + c) + at(shift + c), narrow);
        }
}

/* From grad of y that of x, and those of weight and bias by image: [n, channels]. */
void group_norm_backward(
    const void *grad, const void *x, const float *weight, const float *bias, const unsigned short *words, float by,
    const float *mean, const float *inverse, void *for_x, float *for_weight, float *for_bias,
    size_t n, size_t pixels, size_t channels, size_t groups, int silu, int narrow)
{
    EACH (k, n, (size_t)omp_get_max_threads()) {
        const float *centre = mean + k * groups, *rate = inverse + k * groups;
        float *by_weight = for_weight + k * channels, *by_bias = for_bias + k * channels;
        if (narrow)
            image_gradient(grad, x, weight, bias, words, by, centre, rate, for_x, by_weight, by_bias, k, pixels,
                           channels, groups, silu, 1);
        else
            image_gradient(grad, x, weight, bias, words, by, centre, rate, for_x, by_weight, by_bias, k, pixels,
                           channels, groups, silu, 0);
    }
}
