/* Winograd's transforms for F(4x4, 3x3) of float32 images in channels-last, and their adjoints.

   A tile is 6x6 pixels, and the next lies 4 further; of it, or of a kernel, come 36 numbers for each channel.
   Tiles that are to be factors of products are kept as [tiles, 36, channels], where one's numbers lie close
   together; products come as [36, tiles, channels]. The matrices are those of Lavin and Gray (2016), for the
   points 0, 1, -1, 2, -2 and infinity. Channels are a multiple of 16, heights and widths of 4. */

#include "lanes.h"

typedef void along(const float *from, ptrdiff_t near, float *to, ptrdiff_t far);

enum { TILE = 6, PIXELS = 4, KERNEL = 3 };

static const float SIXTH = 1 / 6.0f;

#define LOCAL __attribute__((aligned(64))) float

/* One dimension each: from numbers `near` apart to numbers `far` apart. */

INLINE void from_tile(const float *x, ptrdiff_t near, float *v, ptrdiff_t far)
{
    lanes a = at(x), b = at(x + near), c = at(x + 2 * near);
    lanes d = at(x + 3 * near), e = at(x + 4 * near), f = at(x + 5 * near);
    lanes p = e - 4 * c, q = d - 4 * b, r = e - c, s = 2 * (d - b);
    put(v, 4 * a - 5 * c + e);
    put(v + far, p + q);
    put(v + 2 * far, p - q);
    put(v + 3 * far, r + s);
    put(v + 4 * far, r - s);
    put(v + 5 * far, 4 * b - 5 * d + f);
}

INLINE void from_tile_adjoint(const float *v, ptrdiff_t near, float *x, ptrdiff_t far)
{
    lanes a = at(v), b = at(v + near), c = at(v + 2 * near);
    lanes d = at(v + 3 * near), e = at(v + 4 * near), f = at(v + 5 * near);
    lanes p = b + c, q = b - c, r = d + e, s = 2 * (d - e);
    put(x, 4 * a);
    put(x + far, 4 * (f - q) - s);
    put(x + 2 * far, -5 * a - 4 * p - r);
    put(x + 3 * far, q + s - 5 * f);
    put(x + 4 * far, a + p + r);
    put(x + 5 * far, f);
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

/* Where the pixels of tile t begin that are its own. */
INLINE size_t corner(size_t t, size_t height, size_t width, size_t channels)
{
    size_t across = width / PIXELS, down = height / PIXELS;
    size_t image = t / (across * down), row = t / across % down, column = t % across;
    return ((image * height + row * PIXELS) * width + column * PIXELS) * channels;
}

/* Which of a tile's rows or columns, from `first` to before `last`, lie within an image. */
INLINE void within(size_t place, size_t most, int *first, int *last)
{
    *first = place == 0;
    *last = place + PIXELS == most ? TILE - 1 : TILE;
}

/* x [n, height, width, channels] to v [tiles, 36, channels]; beyond an image's border there are zeros. If
   `doubled`, x is [n, height / 2, width / 2, channels], whose pixels are each taken twice in both directions. */
void tiles(const float *x, float *v, int doubled, size_t n, size_t height, size_t width, size_t channels)
{
    size_t across = width / PIXELS, down = height / PIXELS, apart = channels;
    ptrdiff_t below = (width >> doubled) * channels, beside = channels;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < n * down * across; t++) {
        const float *image = x + t / (down * across) * (height >> doubled) * below;
        ptrdiff_t row = t / across % down * PIXELS, column = t % across * PIXELS;
        int top, bottom, left, right;
        within(row, height, &top, &bottom);
        within(column, width, &left, &right);
        int whole = !doubled && bottom - top == TILE && right - left == TILE;
        LOCAL tile[TILE * TILE * LANES] = {0};
        for (size_t c = 0; c < channels; c += LANES) {
            const float *from = image + (row - 1) * below + (column - 1) * beside + c;
            float *to = v + t * TILE * TILE * channels + c;
            if (whole) {
                both(from_tile, TILE, from, below, beside, TILE, to, TILE * apart, apart, NULL);
                continue;
            }
            for (int i = top; i < bottom; i++)
                for (int j = left; j < right; j++) {
                    ptrdiff_t y = (row + i - 1) >> doubled, z = (column + j - 1) >> doubled;
                    put(tile + (TILE * i + j) * LANES, at(image + y * below + z * beside + c));
                }
            both(from_tile, TILE, tile, TILE * LANES, LANES, TILE, to, TILE * apart, apart, NULL);
        }
    }
}

/* Its adjoint, of v [36, tiles, channels]: what tiles have in common is added up. A thread has images, or
   channels of them, of its own. */
void tiles_adjoint(const float *v, float *x, int doubled, size_t n, size_t height, size_t width, size_t channels)
{
    size_t across = width / PIXELS, down = height / PIXELS, own = down * across, apart = n * own * channels;
    size_t pixels = (height >> doubled) * (width >> doubled), share = channels % (4 * LANES) ? LANES : 4 * LANES;
    ptrdiff_t below = (width >> doubled) * channels, beside = channels;
#pragma omp parallel for collapse(2) schedule(static)
    for (size_t k = 0; k < n; k++)
        for (size_t begin = 0; begin < channels; begin += share) {
            float *image = x + k * pixels * channels;
            for (size_t pixel = 0; pixel < pixels; pixel++)
                for (size_t c = begin; c < begin + share; c += LANES)
                    put(image + pixel * channels + c, (lanes){0});
            for (size_t t = k * own; t < (k + 1) * own; t++) {
                ptrdiff_t row = t / across % down * PIXELS, column = t % across * PIXELS;
                int top, bottom, left, right;
                within(row, height, &top, &bottom);
                within(column, width, &left, &right);
                for (size_t c = begin; c < begin + share; c += LANES) {
                    LOCAL tile[TILE * TILE * LANES];
                    const float *from = v + t * channels + c;
                    both(from_tile_adjoint, TILE, from, TILE * apart, apart, TILE, tile, TILE * LANES, LANES, NULL);
                    for (int i = top; i < bottom; i++)
                        for (int j = left; j < right; j++) {
                            ptrdiff_t y = (row + i - 1) >> doubled, z = (column + j - 1) >> doubled;
                            float *p = image + y * below + z * beside + c;
                            put(p, at(p) + at(tile + (TILE * i + j) * LANES));
                        }
                }
            }
        }
}

/* m [36, tiles, channels] to y [n, height, width, channels], plus a bias [channels] unless it is NULL. */
void pixels(const float *m, const float *bias, float *y, size_t n, size_t height, size_t width, size_t channels)
{
    size_t count = n * (height / PIXELS) * (width / PIXELS), apart = count * channels;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < count; t++) {
        float *to = y + corner(t, height, width, channels);
        for (size_t c = 0; c < channels; c += LANES)
            both(to_pixels, TILE, m + t * channels + c, TILE * apart, apart,
                 PIXELS, to + c, width * channels, channels, bias ? bias + c : NULL);
    }
}

/* Its adjoint, to m [tiles, 36, channels]. */
void pixels_adjoint(const float *y, float *m, size_t n, size_t height, size_t width, size_t channels)
{
    size_t count = n * (height / PIXELS) * (width / PIXELS), apart = channels, next = TILE * TILE * channels;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < count; t++) {
        const float *from = y + corner(t, height, width, channels);
        for (size_t c = 0; c < channels; c += LANES)
            both(to_pixels_adjoint, PIXELS, from + c, width * channels, channels,
                 TILE, m + t * next + c, TILE * apart, apart, NULL);
    }
}

/* w [n, 3, 3, channels] to u [36, n, channels], whose 36 parts lie `apart`. */
void kernels(const float *w, float *u, size_t apart, size_t n, size_t channels)
{
#pragma omp parallel for schedule(static)
    for (size_t k = 0; k < n; k++)
        for (size_t c = 0; c < channels; c += LANES)
            both(from_kernel, KERNEL, w + k * KERNEL * KERNEL * channels + c, KERNEL * channels, channels,
                 TILE, u + k * channels + c, TILE * apart, apart, NULL);
}

/* The same to u [36, channels, n]. */
void kernels_turned(const float *w, float *u, size_t apart, size_t n, size_t channels)
{
    enum { NEXT = LANES * LANES };
#pragma omp parallel for collapse(2) schedule(static)
    for (size_t c = 0; c < channels; c += LANES)
        for (size_t k = 0; k < n; k += LANES) {
            LOCAL turned[KERNEL * KERNEL * NEXT];
            for (int i = 0; i < KERNEL * KERNEL; i++)
                for (int a = 0; a < LANES; a++)
                    for (int b = 0; b < LANES; b++)
                        turned[i * NEXT + b * LANES + a] = w[((k + a) * KERNEL * KERNEL + i) * channels + c + b];
            for (int b = 0; b < LANES; b++)
                both(from_kernel, KERNEL, turned + b * LANES, KERNEL * NEXT, NEXT,
                     TILE, u + (c + b) * n + k, TILE * apart, apart, NULL);
        }
}

/* The adjoint of the former of the two. */
void kernels_adjoint(const float *u, float *w, size_t apart, size_t n, size_t channels)
{
#pragma omp parallel for schedule(static)
    for (size_t k = 0; k < n; k++)
        for (size_t c = 0; c < channels; c += LANES)
            both(from_kernel_adjoint, TILE, u + k * channels + c, TILE * apart, apart,
                 KERNEL, w + k * KERNEL * KERNEL * channels + c, KERNEL * channels, channels, NULL);
}
