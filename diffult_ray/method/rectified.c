/* Batch norms with the sum with a shortcut and the ReLU behind them, of images in channels-last, and their gradients.

   Images are [n, pixels, channels], channels a multiple of 16: float, or bf16 if they are `narrow`. All else is float.
   Sums are made by image and then over the images in their order, so that they do not depend on the number of
   threads. */

#include "lanes.h"

/* The mean of the k-th image's pixels a channel, and the sum of squares around it. */
INLINE void image_moments(
    const void *x, float *mean, float *square, size_t k, size_t pixels, size_t channels, int narrow)
{
    for (size_t c = 0; c < channels; c += LANES) {
        lanes sum = {0}, squares = {0};
        size_t first = k * pixels * channels + c, last = first + pixels * channels;
        for (size_t i = first; i < last; i += channels)
            sum += number(x, i, narrow);
        lanes centre = sum / (float)pixels;
        for (size_t i = first; i < last; i += channels) {
            lanes apart = number(x, i, narrow) - centre;
            squares += apart * apart;
        }
        put(mean + c, centre);
        put(square + c, squares);
    }
}

/* The same from those of its parts, [parts, 2, channels], of as many pixels each. */
static void gathered(
    const float *moments, float *mean, float *square, size_t parts, size_t pixels, size_t channels)
{
    for (size_t c = 0; c < channels; c += LANES) {
        lanes sum = {0}, squares = {0};
        for (size_t p = 0; p < parts; p++)
            sum += at(moments + 2 * p * channels + c);
        lanes centre = sum / (float)parts;
        for (size_t p = 0; p < parts; p++) {
            lanes apart = at(moments + 2 * p * channels + c) - centre;
            squares += at(moments + (2 * p + 1) * channels + c) + (float)(pixels / parts) * apart * apart;
        }
        put(mean + c, centre);
        put(square + c, squares);
    }
}

/* The mean and the variance [channels] of x over images and pixels, or, unless it is NULL, from the `moments` [n,
   parts, 2, channels] of their parts. `room` has 2 n channels. */
static void batch_moments(
    const void *x, const float *moments, size_t parts, float *mean, float *variance, float *room,
    size_t n, size_t pixels, size_t channels, int narrow)
{
    float *means = room, *squares = room + n * channels;
    EACH (k, n, (size_t)omp_get_max_threads())
        if (moments)
            gathered(moments + 2 * k * parts * channels, means + k * channels, squares + k * channels, parts, pixels,
                     channels);
        else if (narrow)
            image_moments(x, means + k * channels, squares + k * channels, k, pixels, channels, 1);
        else
            image_moments(x, means + k * channels, squares + k * channels, k, pixels, channels, 0);
    for (size_t c = 0; c < channels; c++) {
        double centre = 0, sum = 0;
        for (size_t k = 0; k < n; k++)
            centre += means[k * channels + c];
        centre /= n;
        for (size_t k = 0; k < n; k++) {
            double apart = means[k * channels + c] - centre;
            sum += squares[k * channels + c] + pixels * apart * apart;
        }
        mean[c] = centre;
        variance[c] = sum / (n * pixels);
    }
}

/* y = relu(x scale + shift + aside) of the k-th image, of scale and shift [channels]; `aside`, of x's shape, may be
   NULL. */
INLINE void image_rectified(
    const void *x, const float *scale, const float *shift, const void *aside, void *y,
    size_t k, size_t pixels, size_t channels, int narrow)
{
    for (size_t c = 0; c < channels; c += LANES) {
        lanes by = at(scale + c), more = at(shift + c);
        size_t first = k * pixels * channels + c, last = first + pixels * channels;
        for (size_t i = first; i < last; i += channels) {
            lanes z = number(x, i, narrow) * by + more;
            if (aside)
                z += number(aside, i, narrow);
            store(y, i, above(z, z), narrow);
        }
    }
}

/* y = relu(batch_norm(x) + aside), unless y is NULL: by the running moments, or, if `kept` [4, channels] is not NULL,
   by those of x, or of `moments` as in `batch_moments`, which the running ones move towards by `momentum`; kept are the
   mean, the inverse of the deviation, and scale and shift, by which y = relu(x scale + shift + aside). `room` has 2 n
   channels. */
void relu_of_batch_norm(
    const void *x, const float *weight, const float *bias, const void *aside, void *y,
    float *running_mean, float *running_variance, float *kept, const float *moments, float *room,
    float momentum, float eps, size_t parts, size_t n, size_t pixels, size_t channels, int narrow)
{
    float own[2 * channels], *mean = kept, *inverse = kept + channels;
    float *scale = kept ? kept + 2 * channels : own, *shift = scale + channels;
    if (kept)
        batch_moments(x, moments, parts, mean, inverse, room, n, pixels, channels, narrow);
    for (size_t c = 0; c < channels; c++) {
        double count = n * pixels, centre = kept ? mean[c] : running_mean[c];
        double variance = kept ? inverse[c] : running_variance[c], rate = 1 / __builtin_sqrt(variance + eps);
        scale[c] = weight[c] * rate;
        shift[c] = bias[c] - centre * weight[c] * rate;
        if (!kept)
            continue;
        inverse[c] = rate;
        running_mean[c] += momentum * (centre - running_mean[c]);
        running_variance[c] += momentum * (variance * count / (count - 1) - running_variance[c]);
    }
    if (!y)
        return;
    EACH (k, n, (size_t)omp_get_max_threads())
        if (narrow)
            image_rectified(x, scale, shift, aside, y, k, pixels, channels, 1);
        else
            image_rectified(x, scale, shift, aside, y, k, pixels, channels, 0);
}

/* Of the k-th image the sum of what goes back through the ReLU, and that of its products with x less its mean,
   [channels]; itself it goes to d, of x's shape, which may be `grad`. */
INLINE void image_gradient(
    const void *grad, const void *y, const void *x, const float *kept, void *d, float *sums, float *moments,
    size_t k, size_t pixels, size_t channels, int narrow)
{
    for (size_t c = 0; c < channels; c += LANES) {
        lanes sum = {0}, moment = {0}, centre = at(kept + c);
        lanes by = at(kept + 2 * channels + c), more = at(kept + 3 * channels + c);
        size_t first = k * pixels * channels + c, last = first + pixels * channels;
        for (size_t i = first; i < last; i += channels) {
            lanes z = y ? number(y, i, narrow) : number(x, i, narrow) * by + more;
            lanes through = above(z, number(grad, i, narrow));
            sum += through;
            moment += through * (number(x, i, narrow) - centre);
            store(d, i, through, narrow);
        }
        put(sums + k * channels + c, sum);
        put(moments + k * channels + c, moment);
    }
}

/* d scale + x slope + shift of the k-th image, which may be d itself. */
INLINE void image_sum(
    const void *d, const void *x, const float *scale, const float *slope, const float *shift, void *for_x,
    size_t k, size_t pixels, size_t channels, int narrow)
{
    for (size_t c = 0; c < channels; c += LANES) {
        lanes by = at(scale + c), factor = at(slope + c), more = at(shift + c);
        size_t first = k * pixels * channels + c, last = first + pixels * channels;
        for (size_t i = first; i < last; i += channels)
            store(for_x, i, number(d, i, narrow) * by + number(x, i, narrow) * factor + more, narrow);
    }
}

/* From grad of y, and y, those of x, of what was beside it (of x's shape; NULL if there was nothing), and of the
   norm's weight and bias, [channels]. `kept` as in `relu_of_batch_norm`; y may be NULL if there was nothing beside x.
   `for_x` may be `grad`. `room` has 2 n channels. */
void relu_of_batch_norm_backward(
    const void *grad, const void *y, const void *x, const float *weight, const float *kept,
    void *for_x, void *for_aside, float *for_weight, float *for_bias, float *room,
    size_t n, size_t pixels, size_t channels, int narrow)
{
    const float *mean = kept, *inverse = kept + channels;
    float *moments = room, *sums = room + n * channels;
    void *d = for_aside ? for_aside : for_x;
    EACH (k, n, (size_t)omp_get_max_threads())
        if (narrow)
            image_gradient(grad, y, x, kept, d, sums, moments, k, pixels, channels, 1);
        else
            image_gradient(grad, y, x, kept, d, sums, moments, k, pixels, channels, 0);
    float scale[channels], slope[channels], shift[channels];
    for (size_t c = 0; c < channels; c++) {
        double sum = 0, moment = 0, rate = inverse[c], count = n * pixels;
        for (size_t k = 0; k < n; k++) {
            sum += sums[k * channels + c];
            moment += moments[k * channels + c];
        }
        for_bias[c] = sum;
        for_weight[c] = moment * rate;
        scale[c] = weight[c] * rate;
        slope[c] = -weight[c] * rate * rate * rate * moment / count;
        shift[c] = -weight[c] * rate * sum / count - (double)slope[c] * mean[c];
    }
    EACH (j, n, (size_t)omp_get_max_threads())
        if (narrow)
            image_sum(d, x, scale, slope, shift, for_x, j, pixels, channels, 1);
        else
            image_sum(d, x, scale, slope, shift, for_x, j, pixels, channels, 0);
}
