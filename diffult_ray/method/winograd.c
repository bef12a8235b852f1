/* Winograd's transforms for F(4x4, 3x3) of float32 images in channels-last, and their adjoints.

   A tile is 6x6 pixels that lie 4 apart; of it, or of a kernel, come 36 numbers for each channel, kept as
   [36, tiles or kernels, channels]. The matrices are those of Lavin and Gray (2016), for the points 0, 1,
   -1, 2, -2 and infinity. Channels are a multiple of 16, heights and widths of 4. */

#include <stddef.h>

typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef void along(const lanes *from, lanes *to, ptrdiff_t near, ptrdiff_t far);

enum { LANES = 16, TILE = 6, PIXELS = 4, KERNEL = 3 };

static const float SIXTH = 1 / 6.0f;

#define INLINE static inline __attribute__((always_inline))

INLINE lanes at(const float *p) { return *(const lanes *)p; }
INLINE void put(float *p, lanes x) { *(lanes *)p = x; }

/* One dimension each: numbers `near` apart in `from`, `far` apart in `to`. */

INLINE void from_tile(const lanes *x, lanes *v, ptrdiff_t near, ptrdiff_t far)
{
    lanes a = x[0], b = x[near], c = x[2 * near], d = x[3 * near], e = x[4 * near], f = x[5 * near];
    lanes p = e - 4 * c, q = d - 4 * b, r = e - c, s = 2 * (d - b);
    v[0] = 4 * a - 5 * c + e;
    v[far] = p + q;
    v[2 * far] = p - q;
    v[3 * far] = r + s;
    v[4 * far] = r - s;
    v[5 * far] = 4 * b - 5 * d + f;
}

INLINE void from_tile_adjoint(const lanes *v, lanes *x, ptrdiff_t near, ptrdiff_t far)
{
    lanes a = v[0], f = v[5 * near], p = v[near] + v[2 * near], q = v[near] - v[2 * near];
    lanes r = v[3 * near] + v[4 * near], s = 2 * (v[3 * near] - v[4 * near]);
    x[0] = 4 * a;
    x[far] = 4 * (f - q) - s;
    x[2 * far] = -5 * a - 4 * p - r;
    x[3 * far] = q + s - 5 * f;
    x[4 * far] = a + p + r;
    x[5 * far] = f;
}

INLINE void to_pixels(const lanes *m, lanes *y, ptrdiff_t near, ptrdiff_t far)
{
    lanes p = m[near] + m[2 * near], q = m[near] - m[2 * near];
    lanes r = m[3 * near] + m[4 * near], s = 2 * (m[3 * near] - m[4 * near]);
    y[0] = m[0] + p + r;
    y[far] = q + s;
    y[2 * far] = p + 4 * r;
    y[3 * far] = q + 4 * s + m[5 * near];
}

INLINE void to_pixels_adjoint(const lanes *y, lanes *m, ptrdiff_t near, ptrdiff_t far)
{
    lanes a = y[0], b = y[near], c = y[2 * near], d = y[3 * near];
    lanes p = a + c, q = b + d, r = a + 4 * c, s = 2 * b + 8 * d;
    m[0] = a;
    m[far] = p + q;
    m[2 * far] = p - q;
    m[3 * far] = r + s;
    m[4 * far] = r - s;
    m[5 * far] = d;
}

INLINE void from_kernel(const lanes *w, lanes *u, ptrdiff_t near, ptrdiff_t far)
{
    lanes a = w[0], b = w[near], c = w[2 * near];
    lanes p = (a + c) * -SIXTH, q = b * SIXTH, r = (a * 0.25f + c) * SIXTH, s = b * (SIXTH / 2);
    u[0] = a * 0.25f;
    u[far] = p - q;
    u[2 * far] = p + q;
    u[3 * far] = r + s;
    u[4 * far] = r - s;
    u[5 * far] = c;
}

INLINE void from_kernel_adjoint(const lanes *u, lanes *w, ptrdiff_t near, ptrdiff_t far)
{
    lanes p = (u[near] + u[2 * near]) * -SIXTH, q = (u[2 * near] - u[near]) * SIXTH;
    lanes r = (u[3 * near] + u[4 * near]) * SIXTH, s = (u[3 * near] - u[4 * near]) * SIXTH;
    w[0] = u[0] * 0.25f + p + r * 0.25f;
    w[far] = q + s * 0.5f;
    w[2 * far] = p + r + u[5 * near];
}

/* `n` x `n` numbers to `m` x `m`: down the columns, then along the rows. */
INLINE void both(along *transform, const lanes *from, int n, lanes *to, int m)
{
    lanes half[TILE * TILE];
    for (int j = 0; j < n; j++)
        transform(from + j, half + j, n, n);
    for (int i = 0; i < m; i++)
        transform(half + n * i, to + m * i, 1, 1);
}

INLINE void gather(const float *v, size_t apart, lanes *numbers)
{
    for (int i = 0; i < TILE * TILE; i++)
        numbers[i] = at(v + i * apart);
}

INLINE void scatter(const lanes *numbers, float *v, size_t apart)
{
    for (int i = 0; i < TILE * TILE; i++)
        put(v + i * apart, numbers[i]);
}

/* Where the pixels of tile t begin that are its own. */
INLINE size_t corner(size_t t, size_t height, size_t width, size_t channels)
{
    size_t across = width / PIXELS, down = height / PIXELS;
    size_t image = t / (across * down), row = t / across % down, column = t % across;
    return ((image * height + row * PIXELS) * width + column * PIXELS) * channels;
}

/* x [n, height, width, channels] to v [36, tiles, channels]; beyond an image's border there are zeros. */
void tiles(const float *x, float *v, size_t n, size_t height, size_t width, size_t channels)
{
    size_t across = width / PIXELS, down = height / PIXELS, count = n * down * across;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < count; t++) {
        ptrdiff_t row = t / across % down * PIXELS, column = t % across * PIXELS;
        const float *own = x + corner(t, height, width, channels);
        for (size_t c = 0; c < channels; c += LANES) {
            lanes tile[TILE * TILE] = {0}, numbers[TILE * TILE];
            for (int i = 0; i < TILE; i++)
                for (int j = 0; j < TILE; j++) {
                    ptrdiff_t y = row + i - 1, z = column + j - 1;
                    if (y >= 0 && y < (ptrdiff_t)height && z >= 0 && z < (ptrdiff_t)width)
                        tile[TILE * i + j] = at(own + ((i - 1) * (ptrdiff_t)width + j - 1) * (ptrdiff_t)channels + c);
                }
            both(from_tile, tile, TILE, numbers, TILE);
            scatter(numbers, v + t * channels + c, count * channels);
        }
    }
}

/* Its adjoint: what tiles have in common is added up. A thread has images, or channels of them, of its own. */
void tiles_adjoint(const float *v, float *x, size_t n, size_t height, size_t width, size_t channels)
{
    size_t across = width / PIXELS, down = height / PIXELS, count = n * down * across;
    size_t share = channels % (4 * LANES) ? LANES : 4 * LANES;
#pragma omp parallel for collapse(2) schedule(static)
    for (size_t image = 0; image < n; image++)
        for (size_t first = 0; first < channels; first += share) {
            for (size_t pixel = image * height * width; pixel < (image + 1) * height * width; pixel++)
                for (size_t c = first; c < first + share; c += LANES)
                    put(x + pixel * channels + c, (lanes){0});
            for (size_t t = image * down * across; t < (image + 1) * down * across; t++) {
                ptrdiff_t row = t / across % down * PIXELS, column = t % across * PIXELS;
                float *own = x + corner(t, height, width, channels);
                for (size_t c = first; c < first + share; c += LANES) {
                    lanes tile[TILE * TILE], numbers[TILE * TILE];
                    gather(v + t * channels + c, count * channels, numbers);
                    both(from_tile_adjoint, numbers, TILE, tile, TILE);
                    for (int i = 0; i < TILE; i++)
                        for (int j = 0; j < TILE; j++) {
                            ptrdiff_t y = row + i - 1, z = column + j - 1;
                            if (y >= 0 && y < (ptrdiff_t)height && z >= 0 && z < (ptrdiff_t)width) {
                                float *p = own + ((i - 1) * (ptrdiff_t)width + j - 1) * (ptrdiff_t)channels + c;
                                put(p, at(p) + tile[TILE * i + j]);
                            }
                        }
                }
            }
        }
}

/* m [36, tiles, channels] to y [n, height, width, channels], plus a bias [channels] unless it is NULL. */
void pixels(const float *m, const float *bias, float *y, size_t n, size_t height, size_t width, size_t channels)
{
    size_t count = n * (height / PIXELS) * (width / PIXELS);
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < count; t++) {
        float *own = y + corner(t, height, width, channels);
        for (size_t c = 0; c < channels; c += LANES) {
            lanes numbers[TILE * TILE], found[PIXELS * PIXELS], more = bias ? at(bias + c) : (lanes){0};
            gather(m + t * channels + c, count * channels, numbers);
            both(to_pixels, numbers, TILE, found, PIXELS);
            for (int i = 0; i < PIXELS; i++)
                for (int j = 0; j < PIXELS; j++)
                    put(own + (i * width + j) * channels + c, found[PIXELS * i + j] + more);
        }
    }
}

void pixels_adjoint(const float *y, float *m, size_t n, size_t height, size_t width, size_t channels)
{
    size_t count = n * (height / PIXELS) * (width / PIXELS);
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < count; t++) {
        const float *own = y + corner(t, height, width, channels);
        for (size_t c = 0; c < channels; c += LANES) {
            lanes given[PIXELS * PIXELS], numbers[TILE * TILE];
            for (int i = 0; i < PIXELS; i++)
                for (int j = 0; j < PIXELS; j++)
                    given[PIXELS * i + j] = at(own + (i * width + j) * channels + c);
            both(to_pixels_adjoint, given, PIXELS, numbers, TILE);
            scatter(numbers, m + t * channels + c, count * channels);
        }
    }
}

/* w [n, 3, 3, channels], or [3, 3, n, channels] if `inside`, to u [36, n, channels]. */
void kernels(const float *w, float *u, size_t n, size_t channels, int inside)
{
    size_t next = inside ? channels : KERNEL * KERNEL * channels, apart = inside ? n * channels : channels;
#pragma omp parallel for schedule(static)
    for (size_t k = 0; k < n; k++)
        for (size_t c = 0; c < channels; c += LANES) {
            lanes kernel[KERNEL * KERNEL], numbers[TILE * TILE];
            for (int i = 0; i < KERNEL * KERNEL; i++)
                kernel[i] = at(w + k * next + i * apart + c);
            both(from_kernel, kernel, KERNEL, numbers, TILE);
            scatter(numbers, u + k * channels + c, n * channels);
        }
}

/* Of the former of the two. */
void kernels_adjoint(const float *u, float *w, size_t n, size_t channels)
{
#pragma omp parallel for schedule(static)
    for (size_t k = 0; k < n; k++)
        for (size_t c = 0; c < channels; c += LANES) {
            lanes numbers[TILE * TILE], kernel[KERNEL * KERNEL];
            gather(u + k * channels + c, n * channels, numbers);
            both(from_kernel_adjoint, numbers, TILE, kernel, KERNEL);
            for (int i = 0; i < KERNEL * KERNEL; i++)
                put(w + (k * KERNEL * KERNEL + i) * channels + c, kernel[i]);
        }
}
