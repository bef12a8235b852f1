/* Sixteen channels at a time, which need not be aligned where they lie. */

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
