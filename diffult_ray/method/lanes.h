/* Sixteen channels at a time, which need not be aligned where they lie. */

#include <omp.h>
#include <stddef.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float lanes __attribute__((vector_size(64)));
typedef int whole __attribute__((vector_size(64)));
typedef unsigned naturals __attribute__((vector_size(64)));
typedef float anywhere __attribute__((vector_size(64), aligned(4)));
typedef unsigned short narrow_lanes __attribute__((vector_size(32)));
typedef unsigned short narrow_anywhere __attribute__((vector_size(32), aligned(2)));

enum { LANES = 16 };

#define INLINE static inline __attribute__((always_inline))

INLINE lanes at(const float *p) { return *(const anywhere *)p; }
INLINE void put(float *p, lanes x) { *(anywhere *)p = x; }

/* Sixteen bf16, the upper halves of floats, as floats, and such, rounded to the nearest and of two as near to the even
   one. gcc takes what both are here apart and through memory, where it is not told the instruction. */
INLINE lanes widened(narrow_lanes x)
{
#ifdef __AVX512F__
    return (lanes)((naturals)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
    return (lanes)(__builtin_convertvector(x, naturals) << 16);
#endif
}

INLINE narrow_lanes narrowed(lanes x)
{
#ifdef __AVX512BF16__
    return (narrow_lanes)_mm512_cvtneps_pbh((__m512)x);
#else
    naturals none = (naturals)(x != x), upper = ((naturals)x + 0x7fff + ((naturals)x >> 16 & 1)) >> 16;
    return __builtin_convertvector((upper & ~none) | (none & 0x7fc0), narrow_lanes);
#endif
}

/* `at` and `put` of the i-th number, and those after it, of an array of floats, or, if it is `narrow`, of bf16. */
INLINE lanes number(const void *p, size_t i, int narrow)
{
    return narrow ? widened(*(const narrow_anywhere *)((const short *)p + i)) : at((const float *)p + i);
}

INLINE void store(void *p, size_t i, lanes x, int narrow)
{
    if (narrow)
        *(narrow_anywhere *)((short *)p + i) = narrowed(x);
    else
        put((float *)p + i, x);
}

/* x but where z is 0 or less. What is no number stays none. */
INLINE lanes above(lanes z, lanes x) { return (lanes)(~(z <= 0) & (whole)x); }

/* Parts of a piece of work, which threads take one by one: a thread those of its own share first, the same in each
   piece, so that what it wrote before lies in its own cache, and then what is left of the others', as one may be slower
   than another. */
struct share {
    size_t next, end;
} __attribute__((aligned(64)));

INLINE void divide(struct share *shares, size_t threads, size_t count)
{
    for (size_t t = 0; t < threads; t++)
        shares[t] = (struct share){count * t / threads, count * (t + 1) / threads};
}

/* Whether there is a part left, in *part; `whose` is the thread's own number at first. */
INLINE int take(struct share *shares, size_t threads, size_t own, size_t *whose, size_t *part)
{
    for (; *whose < own + threads; ++*whose) {
        struct share *from = shares + *whose % threads;
        *part = __atomic_fetch_add(&from->next, 1, __ATOMIC_RELAXED);
        if (*part < from->end)
            return 1;
    }
    return 0;
}

#define PRAGMA(words) _Pragma(#words)

/* For each part of a count, by as many threads. */
#define EACH(part, count, threads)                                                                                     \
    struct share part##_shares[threads];                                                                               \
    divide(part##_shares, threads, count);                                                                             \
    PRAGMA(omp parallel num_threads(threads))                                                                          \
    for (size_t part##_own = omp_get_thread_num(), part##_whose = part##_own, part;                                    \
         take(part##_shares, threads, part##_own, &part##_whose, &part);)
