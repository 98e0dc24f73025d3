/* What amx.c, gemm.c and onepass.c share: sixteen float32 numbers at a time. */
#include <immintrin.h>
#include <stdint.h>

#define UNROLLED _Pragma("GCC unroll 16") /* or what stands in registers would stand in memory */
#define INLINE static inline __attribute__((always_inline))

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

static inline long least(long a, long b) { return a < b ? a : b; }

/* Writes the transpose of a 16 x 16 matrix of 32 bits each, its rows `distance` bytes apart: a multiple of 64, as `to`. */
static inline void transpose(__m512i r[16], void *to, long distance) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i even0 = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), even1 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        __m512i odd0 = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd), odd1 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        _mm512_store_si512((char *)to + distance * i, _mm512_shuffle_i32x4(even0, even1, 0x88));
        _mm512_store_si512((char *)to + distance * (i + 4), _mm512_shuffle_i32x4(odd0, odd1, 0x88));
        _mm512_store_si512((char *)to + distance * (i + 8), _mm512_shuffle_i32x4(even0, even1, 0xdd));
        _mm512_store_si512((char *)to + distance * (i + 12), _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
    }
}

/* What is read next, lines of 64 bytes, fetched into the second cache while something else is computed. */
typedef struct { const char *row; long at, width, distance, left; } Ahead;

/* Rows of so many bytes, `distance` bytes apart. */
static inline Ahead ahead_of(const void *from, long bytes, long rows, long distance) {
    long before = (uintptr_t)from & 63, width = (before + bytes + 63) / 64 * 64;
    return (Ahead){(const char *)from - before, 0, width, distance, width / 64 * rows};
}

static inline void fetch(Ahead *next, long lines) {
    for (next->left -= lines; lines > 0; lines--) {
        _mm_prefetch(next->row + next->at, _MM_HINT_T1);
        if ((next->at += 64) >= next->width) next->at = 0, next->row += next->distance;
    }
}
