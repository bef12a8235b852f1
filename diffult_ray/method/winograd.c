/* Convolutions of float32 images in channels-last by Winograd's F(4x4, 3x3), and what the gradient of their
   kernels needs.

   A tile is 6x6 pixels, and the next lies 4 further; of it, or of a kernel, come 36 numbers for each channel,
   which are multiplied apart from each other. Tiles' are kept as [tiles, 36, channels]. The matrices are those of
   Lavin and Gray (2016), for the points 0, 1, -1, 2, -2 and infinity. Channels are a multiple of 16, heights and
   widths of 4. */

#include "lanes.h"

typedef void along(const float *from, ptrdiff_t near, float *to, ptrdiff_t far);

enum { TILE = 6, PIXELS = 4, KERNEL = 3, NUMBERS = TILE * TILE };

/* A product has as many sums at a time as fit into registers: ROWS times MOST lanes. */
#ifdef __AVX512F__
enum { ROWS = 8, MOST = 2 };
#else
enum { ROWS = 4, MOST = 1 };
#endif

/* How far the numbers of two tiles lie apart that are multiplied: no power of two, as all would then have the same
   few places in the caches. */
INLINE size_t step(size_t channels) { return NUMBERS * channels + LANES; }

/* How far the rooms of two threads lie apart, and from what else there is: a processor fetches ahead, by the steps that
   it sees, what lies up to some 200 KB further, and each line of another's room from that one's cache. */
enum { APART = 1 << 16 };

/* A thread's own part of `room`, of so many numbers. */
INLINE float *own_part(float *room, size_t numbers)
{
    return room + APART + omp_get_thread_num() * (numbers + APART);
}

/* Up to so many channels a convolution waits for memory rather than for its products. */
enum { FEW = 32 };

static const float SIXTH = 1 / 6.0f;

#define LOCAL __attribute__((aligned(64))) float

/* One dimension each: from numbers `near` apart to numbers `far` apart. */

INLINE void of_tile(lanes a, lanes b, lanes c, lanes d, lanes e, lanes f, float *v, ptrdiff_t far)
{
    lanes p = e - 4 * c, q = d - 4 * b, r = e - c, s = 2 * (d - b);
    put(v, 4 * a - 5 * c + e);
    put(v + far, p + q);
    put(v + 2 * far, p - q);
    put(v + 3 * far, r + s);
    put(v + 4 * far, r - s);
    put(v + 5 * far, 4 * b - 5 * d + f);
}

INLINE void from_tile(const float *x, ptrdiff_t near, float *v, ptrdiff_t far)
{
    of_tile(at(x), at(x + near), at(x + 2 * near), at(x + 3 * near), at(x + 4 * near), at(x + 5 * near), v, far);
}

INLINE void to_pixels(const float *m, ptrdiff_t near, float *y, ptrdiff_t far)
{
    lanes a = at(m), b = at(m + near), c = at(m + 2 * near);
    lanes d = at(m + 3 * near), e = at(m + 4 * near), f = at(m + 5 * near);
    lanes p = b + c, q = b - c, r = d + e, s = 2 * (d - e);
    put(y, a + p + r);
    put(y + far, q + s);
    put(y + 2 * far, p + 4 * r);
    put(y + 3 * far, q + 4 * s + f);
}

INLINE void to_pixels_adjoint(const float *y, ptrdiff_t near, float *m, ptrdiff_t far)
{
    lanes a = at(y), b = at(y + near), c = at(y + 2 * near), d = at(y + 3 * near);
    lanes p = a + c, q = b + d, r = a + 4 * c, s = 2 * b + 8 * d;
    put(m, a);
    put(m + far, p + q);
    put(m + 2 * far, p - q);
    put(m + 3 * far, r + s);
    put(m + 4 * far, r - s);
    put(m + 5 * far, d);
}

INLINE void from_kernel(const float *w, ptrdiff_t near, float *u, ptrdiff_t far)
{
    lanes a = at(w), b = at(w + near), c = at(w + 2 * near);
    lanes p = (a + c) * -SIXTH, q = b * SIXTH, r = (a * 0.25f + c) * SIXTH, s = b * (SIXTH / 2);
    put(u, a * 0.25f);
    put(u + far, p - q);
    put(u + 2 * far, p + q);
    put(u + 3 * far, r + s);
    put(u + 4 * far, r - s);
    put(u + 5 * far, c);
}

INLINE void from_kernel_adjoint(const float *u, ptrdiff_t near, float *w, ptrdiff_t far)
{
    lanes a = at(u), b = at(u + near), c = at(u + 2 * near);
    lanes d = at(u + 3 * near), e = at(u + 4 * near), f = at(u + 5 * near);
    lanes p = (b + c) * -SIXTH, q = (c - b) * SIXTH, r = (d + e) * SIXTH, s = (d - e) * SIXTH;
    put(w, a * 0.25f + p + r * 0.25f);
    put(w + far, q + s * 0.5f);
    put(w + 2 * far, p + r + f);
}

/* From `n` x `n` to `m` x `m`: down the columns, then along the rows. `more` [LANES], unless it is NULL, is
   added to each that came down the second column, which to_pixels adds to all pixels. */
INLINE void both(
    along *transform, int n, const float *from, ptrdiff_t below, ptrdiff_t beside,
    int m, float *to, ptrdiff_t to_below, ptrdiff_t to_beside, const float *more)
{
    LOCAL half[TILE * TILE * LANES];
#pragma GCC unroll 6
    for (int j = 0; j < n; j++)
        transform(from + j * beside, below, half + j * LANES, n * LANES);
    if (more)
        for (int i = 0; i < m; i++)
            put(half + (i * n + 1) * LANES, at(half + (i * n + 1) * LANES) + at(more));
#pragma GCC unroll 6
    for (int i = 0; i < m; i++)
        transform(half + i * n * LANES, LANES, to + i * to_below, to_beside);
}

/* A tile among those of n images. */
struct place {
    size_t image, row, column;
};

INLINE struct place place_of(size_t t, size_t height, size_t width)
{
    size_t across = width / PIXELS, down = height / PIXELS;
    return (struct place){t / (across * down), t / across % down * PIXELS, t % across * PIXELS};
}

INLINE void advance(struct place *at, size_t height, size_t width)
{
    at->column += PIXELS;
    if (at->column == width) {
        at->column = 0;
        at->row += PIXELS;
    }
    if (at->row == height) {
        at->row = 0;
        at->image++;
    }
}

/* Where the pixels of a tile begin that are its own. */
INLINE size_t corner(struct place at, size_t height, size_t width, size_t channels)
{
    return ((at.image * height + at.row) * width + at.column) * channels;
}

/* What a convolution sees of x: relu(x scale + shift) by channel of `rectify` [2, channels], or x itself where that is
   NULL. */
INLINE lanes seen(const float *x, const float *rectify, size_t c, size_t channels)
{
    if (!rectify)
        return at(x);
    lanes z = at(x) * at(rectify + c) + at(rectify + channels + c);
    return above(z, z);
}

/* A tile of an image of a width, `doubled` or not, whose first row, or last, is beyond the border or not. */
INLINE void from_rows(
    const float *image, const float *rectify, float *v, int doubled, int top, int bottom, struct place place,
    size_t width, size_t channels)
{
    ptrdiff_t apart = (width >> doubled) * channels, row = place.row, column = place.column, rows[TILE];
    int left = column == 0, right = column + PIXELS == (ptrdiff_t)width;
    const lanes zero = {0};
    for (int i = 0; i < TILE; i++)
        rows[i] = ((row + i - 1) >> doubled) * apart;
    for (size_t c = 0; c < channels; c += LANES) {
        LOCAL half[NUMBERS * LANES];
        for (int i = 0; i < TILE && !doubled; i++) /* what the next tile has beside this one's comes nearer */
            for (int j = TILE; j < TILE + PIXELS; j++)
                __builtin_prefetch(image + rows[i] + (column + j - 1) * (ptrdiff_t)channels + c);
#pragma GCC unroll 6
        for (int j = 0; j < TILE; j++) {
            const float *x = image + ((column + j - 1) >> doubled) * (ptrdiff_t)channels + c;
            float *to = half + j * LANES;
            lanes six[TILE];
            if ((j == 0 && left) || (j == TILE - 1 && right)) {
                for (int i = 0; i < TILE; i++)
                    put(to + i * TILE * LANES, zero);
                continue;
            }
#pragma GCC unroll 6
            for (int i = 0; i < TILE; i++) {
                int beyond = (i == 0 && top) || (i == TILE - 1 && bottom);
                six[i] = beyond ? zero : seen(x + rows[i], rectify, c, channels);
            }
            of_tile(six[0], six[1], six[2], six[3], six[4], six[5], to, TILE * LANES);
        }
#pragma GCC unroll 6
        for (int i = 0; i < TILE; i++)
            from_tile(half + i * TILE * LANES, LANES, v + i * TILE * channels + c, channels);
    }
}

/* Apart by what is beyond the border, so that no load is behind a branch. */
INLINE void from_part(
    const float *image, const float *rectify, float *v, struct place at, size_t height, size_t width, size_t channels)
{
    int top = at.row == 0, bottom = at.row + PIXELS == height;
    if (top && bottom)
        from_rows(image, rectify, v, 0, 1, 1, at, width, channels);
    else if (top)
        from_rows(image, rectify, v, 0, 1, 0, at, width, channels);
    else if (bottom)
        from_rows(image, rectify, v, 0, 0, 1, at, width, channels);
    else
        from_rows(image, rectify, v, 0, 0, 0, at, width, channels);
}

/* Of a tile of x [n, height, width, channels], as `seen`, to v [36, channels]; beyond an image's border there are
   zeros. If `doubled`, x is [n, height / 2, width / 2, channels], whose pixels are each taken twice in both directions,
   as they are. */
static void from_image(
    const float *x, const float *rectify, float *v, int doubled, struct place at, size_t height, size_t width,
    size_t channels)
{
    const float *image = x + at.image * (height >> doubled) * (width >> doubled) * channels;
    if (doubled)
        from_rows(image, NULL, v, 1, at.row == 0, at.row + PIXELS == height, at, width, channels);
    else if (rectify)
        from_part(image, rectify, v, at, height, width, channels);
    else
        from_part(image, NULL, v, at, height, width, channels);
}

/* The adjoint of what comes behind the products, from a tile's pixels of y [n, height, width, channels] to m [36,
   channels]. */
static void from_pixels(const float *y, float *m, struct place place, size_t height, size_t width, size_t channels)
{
    const float *from = y + corner(place, height, width, channels);
    for (size_t c = 0; c < channels; c += LANES) {
        for (int i = 0; i < PIXELS; i++) /* the next tile's */
            for (int j = PIXELS; j < 2 * PIXELS; j++)
                __builtin_prefetch(from + (i * width + j) * channels + c);
        both(to_pixels_adjoint, PIXELS, from + c, width * channels, channels,
             TILE, m + c, TILE * channels, channels, NULL);
    }
}

/* sums += v u: of v [ROWS, depth], whose rows lie `apart`, and u [depth, wide lanes]. Meanwhile `ahead` [depth,
   LANES], unless it is NULL, comes nearer. */
INLINE void multiply(
    int wide, const float *v, size_t apart, const float *u, size_t depth, const float *ahead, lanes sums[ROWS][MOST])
{
#pragma GCC unroll 2
    for (size_t d = 0; d < depth; d++) {
        lanes b[MOST];
        if (ahead)
            __builtin_prefetch(ahead + d * LANES, 0, 2);
#pragma GCC unroll 2
        for (int w = 0; w < wide; w++)
            b[w] = at(u + (d * wide + w) * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int w = 0; w < wide; w++)
                sums[r][w] += v[r * apart + d] * b[w];
    }
}

/* m [tiles, 36, outputs] = v [tiles, 36, channels] by u [36, outputs / width, channels, width], whose parts lie
   `apart`; a width is `wide` lanes, and tiles are a multiple of ROWS. The part of u behind the one at work is
   fetched by as many rows as it takes. */
INLINE void by_kernels(
    int wide, const float *v, const float *u, size_t apart, float *m, size_t tiles, size_t channels, size_t outputs)
{
    size_t width = wide * LANES;
    for (int i = 0; i < NUMBERS; i++)
        for (size_t k = 0; k < outputs; k += width)
            for (size_t t = 0; t < tiles; t += ROWS) {
                const float *from = v + t * step(channels) + i * channels, *by = u + i * apart + k * channels;
                const float *ahead = by + (width + t / ROWS * LANES) * channels;
                float *to = m + t * step(outputs) + i * outputs + k;
                lanes sums[ROWS][MOST] = {0};
                if (t < (size_t)wide * ROWS) /* two calls, so that the loop in them has no branch */
                    multiply(wide, from, step(channels), by, channels, ahead, sums);
                else
                    multiply(wide, from, step(channels), by, channels, NULL, sums);
                for (int r = 0; r < ROWS; r++)
                    for (int w = 0; w < wide; w++)
                        put(to + r * step(outputs) + w * LANES, sums[r][w]);
            }
}

/* How many lanes of the kernels are multiplied at a time. */
INLINE int lanes_at_once(size_t outputs) { return outputs % (MOST * LANES) ? 1 : MOST; }

/* From the numbers m [36, channels] of a tile to its pixels, which begin at y, of images of a `width`, plus a bias
   [channels] and the pixels `aside`, which lie as those of y do and may be those, unless they are NULL. `moments` [2,
   channels], unless it is NULL, gets the mean of the pixels, without `aside`, and the sum of squares around it. */
INLINE void to_image(
    const float *m, const float *bias, const float *aside, float *y, float *moments, size_t width, size_t channels)
{
    for (size_t c = 0; c < channels; c += LANES) {
        const float *more = bias ? bias + c : NULL;
        if (!aside && !moments) {
            both(to_pixels, TILE, m + c, TILE * channels, channels, PIXELS, y + c, width * channels, channels, more);
            continue;
        }
        LOCAL own[PIXELS * PIXELS * LANES];
        both(to_pixels, TILE, m + c, TILE * channels, channels, PIXELS, own, PIXELS * LANES, LANES, more);
        lanes sum = {0}, square = {0};
#pragma GCC unroll 16
        for (int i = 0; i < PIXELS * PIXELS; i++) {
            size_t pixel = (i / PIXELS * width + i % PIXELS) * channels + c;
            lanes value = at(own + i * LANES);
            put(y + pixel, aside ? value + at(aside + pixel) : value);
            sum += value;
        }
        if (!moments)
            continue;
        lanes mean = sum * (1.0f / (PIXELS * PIXELS));
#pragma GCC unroll 16
        for (int i = 0; i < PIXELS * PIXELS; i++) {
            lanes apart = at(own + i * LANES) - mean;
            square += apart * apart;
        }
        put(moments + c, mean);
        put(moments + channels + c, square);
    }
}

/* y [n, height, width, outputs] of x [n, height, width, channels], as `seen`, by u as in `by_kernels`, plus a bias [n,
   outputs], whose rows lie `bias_apart`, and images `aside` [asides, height, width, outputs], taken from the first
   again behind the last; `moments` [tiles, 2, outputs] as in `to_image`. A thread takes up to `most` tiles at a time, a
   multiple of ROWS, from the images to the images, so that what lies between two steps stays in its cache, in a part of
   its own of `room`. */
void convolution(
    const float *x, const float *rectify, const float *u, size_t apart, const float *bias, size_t bias_apart,
    const float *aside, size_t asides, float *y, float *moments, float *room, int doubled, size_t most,
    size_t threads, size_t n, size_t height, size_t width, size_t channels, size_t outputs)
{
    size_t count = n * (height / PIXELS) * (width / PIXELS);
    size_t share = (count + threads * ROWS - 1) / (threads * ROWS) * ROWS;
    most = share < most ? share : most;
    EACH (block, (count + most - 1) / most, threads) {
        size_t first = block * most;
        float *v = own_part(room, most * (step(channels) + step(outputs)));
        float *m = v + most * step(channels);
        size_t own = count - first < most ? count - first : most, tiles = (own + ROWS - 1) / ROWS * ROWS;
        struct place place = place_of(first, height, width), back = place;
        for (size_t t = 0; t < own; t++, advance(&place, height, width)) {
            from_image(x, rectify, v + t * step(channels), doubled, place, height, width, channels);
            float *to = y + corner(place, height, width, outputs);
            for (int i = 0; i < PIXELS && outputs <= FEW; i++)
                for (size_t c = 0; c < PIXELS * outputs; c += LANES)
                    __builtin_prefetch(to + i * width * outputs + c, 1);
        }
        if (lanes_at_once(outputs) == MOST)
            by_kernels(MOST, v, u, apart, m, tiles, channels, outputs);
        else
            by_kernels(1, v, u, apart, m, tiles, channels, outputs);
        for (size_t t = 0; t < own; t++, advance(&back, height, width)) {
            struct place beside = {asides ? back.image % asides : 0, back.row, back.column};
            to_image(m + t * step(outputs), bias ? bias + back.image * bias_apart : NULL,
                     asides ? aside + corner(beside, height, width, outputs) : NULL,
                     y + corner(back, height, width, outputs),
                     moments ? moments + (first + t) * 2 * outputs : NULL, width, outputs);
        }
    }
}

/* All tiles of x, as in `from_image`, to v [tiles, 36, channels]. */
void tiles(
    const float *x, const float *rectify, float *v, int doubled, size_t n, size_t height, size_t width, size_t channels)
{
    size_t count = n * (height / PIXELS) * (width / PIXELS);
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < count; t++)
        from_image(x, rectify, v + t * NUMBERS * channels, doubled, place_of(t, height, width), height, width,
                   channels);
}

/* The adjoint of what comes behind the products, from y [n, height, width, channels] to m [tiles, 36, channels]. */
void pixels_adjoint(const float *y, float *m, size_t n, size_t height, size_t width, size_t channels)
{
    size_t count = n * (height / PIXELS) * (width / PIXELS);
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < count; t++)
        from_pixels(y, m + t * NUMBERS * channels, place_of(t, height, width), height, width, channels);
}

/* Half of the rows of a square is exchanged with half of its columns, in squares of 2 `side`. */
INLINE void exchange(lanes rows[LANES], int side)
{
    whole low, high;
    for (int j = 0; j < LANES; j++) {
        low[j] = j & side ? LANES + j - side : j;
        high[j] = j & side ? LANES + j : j + side;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & side)) {
            lanes a = rows[i], b = rows[i + side];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + side] = __builtin_shuffle(a, b, high);
        }
}

/* A square of LANES rows, which lie `apart`, to one whose rows are its columns. */
INLINE void transpose(const float *from, size_t apart, float *to)
{
    lanes rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        rows[i] = at(from + i * apart);
    exchange(rows, 8);
    exchange(rows, 4);
    exchange(rows, 2);
    exchange(rows, 1);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        put(to + i * LANES, rows[i]);
}

/* w [outputs, 3, 3, channels] to u as in `by_kernels`, to convolve with. */
void kernels(const float *w, float *u, size_t apart, size_t outputs, size_t channels)
{
    enum { NEXT = LANES * LANES };
    size_t width = lanes_at_once(outputs) * LANES;
#pragma omp parallel for collapse(2) schedule(static)
    for (size_t c = 0; c < channels; c += LANES)
        for (size_t k = 0; k < outputs; k += LANES) {
            LOCAL turned[KERNEL * KERNEL * NEXT];
            for (int i = 0; i < KERNEL * KERNEL; i++)
                transpose(w + (k * KERNEL * KERNEL + i) * channels + c, KERNEL * KERNEL * channels, turned + i * NEXT);
            for (int b = 0; b < LANES; b++)
                both(from_kernel, KERNEL, turned + b * LANES, KERNEL * NEXT, NEXT,
                     TILE, u + k / width * width * channels + (c + b) * width + k % width, TILE * apart, apart, NULL);
        }
}

/* The same to convolve the gradient of y with, for that of x: turned by half a turn, [36, channels / width,
   outputs, width]. */
void kernels_turned(const float *w, float *u, size_t apart, size_t outputs, size_t channels)
{
    size_t width = lanes_at_once(channels) * LANES;
    ptrdiff_t below = KERNEL * channels, beside = channels;
#pragma omp parallel for schedule(static)
    for (size_t k = 0; k < outputs; k++)
        for (size_t c = 0; c < channels; c += LANES)
            both(from_kernel, KERNEL, w + (k + 1) * KERNEL * KERNEL * channels - channels + c, -below, -beside,
                 TILE, u + c / width * width * outputs + k * width + c % width, TILE * apart, apart, NULL);
}

/* From the gradient of the kernels' numbers, u [36, outputs, channels], whose parts lie `apart`, that of w [outputs,
   3, 3, channels]. */
void kernels_adjoint(const float *u, float *w, size_t apart, size_t outputs, size_t channels)
{
#pragma omp parallel for schedule(static)
    for (size_t k = 0; k < outputs; k++)
        for (size_t c = 0; c < channels; c += LANES)
            both(from_kernel_adjoint, TILE, u + k * channels + c, TILE * apart, apart,
                 KERNEL, w + k * KERNEL * KERNEL * channels + c, KERNEL * channels, channels, NULL);
}

/* u [36, outputs, channels] += the products of m [tiles, 36, outputs] and v [tiles, 36, channels] over the tiles; the
   parts of u lie `apart`. */
INLINE void over_tiles(
    int rows, int wide, const float *m, const float *v, float *u, size_t apart, size_t tiles, size_t channels,
    size_t outputs)
{
    for (int i = 0; i < NUMBERS; i++)
        for (size_t k = 0; k < outputs; k += rows)
            for (size_t c = 0; c < channels; c += wide * LANES) {
                float *to = u + i * apart + k * channels + c;
                const float *row = m + i * outputs + k, *column = v + i * channels + c;
                lanes sums[rows][wide];
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                    for (int w = 0; w < wide; w++)
                        sums[r][w] = at(to + r * channels + w * LANES);
                for (size_t t = 0; t < tiles; t++, row += step(outputs), column += step(channels)) {
#pragma GCC unroll 16
                    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                        for (int w = 0; w < wide; w++)
                            sums[r][w] += row[r] * at(column + w * LANES);
                }
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                    for (int w = 0; w < wide; w++)
                        put(to + r * channels + w * LANES, sums[r][w]);
            }
}

/* The gradient of w [outputs, 3, 3, channels] from that of y [n, height, width, outputs] and from x [n, height,
   width, channels], as `seen`. The tiles are summed in as many `parts`, and the parts in their order, so that
   threads change nothing; one takes `most` tiles at a time, and has a part of its own of `room` for them, behind the
   sums. */
void kernels_gradient(
    const float *x, const float *rectify, const float *y, float *w, float *room, int doubled, size_t most,
    size_t parts, size_t threads, size_t n, size_t height, size_t width, size_t channels, size_t outputs)
{
    size_t count = n * (height / PIXELS) * (width / PIXELS), apart = outputs * channels + LANES;
    size_t all = NUMBERS * apart;
    EACH (part, parts, threads) {
        float *u = room + part * all;
        float *v = own_part(room + parts * all, most * (step(channels) + step(outputs)));
        float *m = v + most * step(channels);
        size_t begin = count * part / parts, end = count * (part + 1) / parts;
        for (size_t i = 0; i < all; i++)
            u[i] = 0;
        struct place place = place_of(begin, height, width);
        for (size_t first = begin; first < end; first += most) {
            size_t tiles = end - first < most ? end - first : most;
            for (size_t t = 0; t < tiles; t++, advance(&place, height, width)) {
                from_image(x, rectify, v + t * step(channels), doubled, place, height, width, channels);
                from_pixels(y, m + t * step(outputs), place, height, width, outputs);
            }
            if (channels % (MOST * LANES))
                over_tiles(MOST * ROWS, 1, m, v, u, apart, tiles, channels, outputs);
            else
                over_tiles(ROWS, MOST, m, v, u, apart, tiles, channels, outputs);
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t i = 0; i < all; i += LANES) {
        lanes sum = at(room + i);
        for (size_t part = 1; part < parts; part++)
            sum += at(room + part * all + i);
        put(room + i, sum);
    }
    kernels_adjoint(room, w, apart, outputs, channels);
}
