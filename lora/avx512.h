/* Sixteen float32 numbers at a time: what amx.c and onepass.c share. */
#include <immintrin.h>

/* The mask of the first `left` of 16 numbers. */
static inline __mmask16 first(long left) { return left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0; }

/* The first `left` of 16 numbers, zeros after them. */
static inline __m512 load(const float *x, long left) {
    return left >= 16 ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(first(left), x);
}

static inline void store(float *y, __m512 v, long left) {
    if (left >= 16) _mm512_storeu_ps(y, v);
    else _mm512_mask_storeu_ps(y, first(left), v);
}

static inline __m512 number(float x) { return _mm512_set1_ps(x); }
