/* Stands in for AMX's tiles, for the tests of amx.c, on a CPU with AVX-512 and bfloat16: a compiler is told to include it
 * first. All tiles have 16 rows of 64 bytes, as amx.c configures them. */
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static __thread char tile[8][16][64] __attribute__((aligned(64)));
static __thread int configured;

static inline char (*tile_of(int t))[64] {
    if (!configured) abort();
    return tile[t];
}

static inline void configure(const char *config) { /* Intel's manual, LDTILECFG: palette, 16 sizes of rows, 16 numbers of rows */
    for (int t = 0; t < 8; t++)
        if (config[0] != 1 || config[16 + 2 * t] != 64 || config[17 + 2 * t] || config[48 + t] != 16) abort();
    configured = 1;
}

static inline void fill(int t, const char *from, long distance) {
    for (int m = 0; m < 16; m++) memcpy(tile_of(t)[m], from + m * distance, 64);
}

static inline void spill(int t, char *to, long distance) {
    for (int m = 0; m < 16; m++) memcpy(to + m * distance, tile_of(t)[m], 64);
}

/* TDPBF16PS: c[m][n] += a[m][2 k] b[k][2 n] + a[m][2 k + 1] b[k][2 n + 1] */
static inline void add_products_of_tiles(int c, int a, int b) {
    for (int m = 0; m < 16; m++) {
        __m512 sum = _mm512_load_ps(tile_of(c)[m]);
        for (int k = 0; k < 16; k++)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(((const int *)tile_of(a)[m])[k]),
                                   (__m512bh)_mm512_load_si512(tile_of(b)[k]));
        _mm512_store_ps(tile_of(c)[m], sum);
    }
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) configure((const char *)(config))
#define _tile_release() (configured = 0)
#define _tile_zero(t) memset(tile_of(t), 0, 16 * 64)
#define _tile_loadd(t, from, distance) fill(t, (const char *)(from), distance)
#define _tile_stored(t, to, distance) spill(t, (char *)(to), distance)
#define _tile_dpbf16ps(c, a, b) add_products_of_tiles(c, a, b)
#define syscall(...) 0 /* the system grants them */
