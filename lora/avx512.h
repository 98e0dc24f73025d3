/* Sixteen float32 numbers at a time: what amx.c and onepass.c share. */
#include <immintrin.h>

/* The first `left` of 16 numbers, zeros after them. */
static inline __m512 load(const float *x, long left) {
    return left >= 16 ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(left > 0 ? (1 << left) - 1 : 0, x);
}

static inline void store(float *y, __m512 v, long left) {
    if (left >= 16) _mm512_storeu_ps(y, v);
    else _mm512_mask_storeu_ps(y, (1 << left) - 1, v);
}

static inline __m512 number(float x) { return _mm512_set1_ps(x); }
