/* Sixteen channels at a time, which need not be aligned where they lie. */

#include <omp.h>
#include <stddef.h>

typedef float lanes __attribute__((vector_size(64)));
typedef int whole __attribute__((vector_size(64)));
typedef float anywhere __attribute__((vector_size(64), aligned(4)));

enum { LANES = 16 };

#define INLINE static inline __attribute__((always_inline))

INLINE lanes at(const float *p) { return *(const anywhere *)p; }
INLINE void put(float *p, lanes x) { *(anywhere *)p = x; }

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
