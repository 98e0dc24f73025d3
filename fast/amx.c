/* Matrix products on a CPU with AMX tiles: see amx.py. Numbers are float32, rows contiguous.
 *
 * Products take each number as the sum of two bfloat16: a = ah + al with ah = bf16(a), al = bf16(a - ah), b
 * likewise: 16 bits of the mantissa instead of 24. Then a b = ah bh + ah bl + al bh, and al bl, 2^-16 of it at most, is
 * left out (Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
 * Computations"). Tiles multiply bfloat16 and add up in float32.
 *
 * Frozen weights are split anew for every matmul: if cached, their parts would take the weights' memory once more for
 * each of forward and backward, which read them in different orders.
 *
 * A tile holds 16 rows of 16 pairs of bfloat16. TDPBF16PS is c[m][n] += a[m][i].first b[i][n].first + the same of the
 * second, over i < 16, for 16 rows m and columns n. Here pair i is of k = i and k = i + 16, in a and in b: any order
 * will do, and this one needs no shuffling.
 */
#include <omp.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

#define COLUMNS 32      /* of b that are packed and multiplied at a time */
#define DEPTH 64        /* rows of b, likewise: 8 KiB, which stay in the nearest cache */
#define NEAR (3 << 18)  /* bytes of packed a that stay in the second cache while b passes by */
#define TILE 512        /* bfloat16 in a tile */
#define BLOCK (2 * 16 * DEPTH) /* bfloat16 of 16 rows of a block of a: pairs of tiles, high and low */

typedef uint16_t bf16;

_Static_assert(TILE * sizeof(bf16) == 16 * 64, "a tile is 16 rows of 64 bytes");
_Static_assert(COLUMNS == 32, "multiply and the packing of b take two tiles of 16 columns");
_Static_assert(DEPTH % 32 == 0, "a block is packed in whole tiles, each of 32 rows of b");
_Static_assert(BLOCK == DEPTH / 32 * 2 * TILE, "pack_a writes two tiles for each 32 columns of a");
_Static_assert(BLOCK * sizeof(bf16) % 64 == 0 && 16 * COLUMNS * sizeof(float) % 64 == 0,
               "aligned_alloc takes multiples of the alignment, and each thread's buffer begins at one");

/* A term of the sum is a (M, K) times b (K, N). The columns of the result are in parts, each with a b of its own for
 * every term: weights of layers that read the same a. b is stored as (N, K) if transposed. Rows lie lda and ldb numbers
 * apart. */
typedef struct { const float *a; long K, lda; } Term;
typedef struct { const float *b; long ldb, transposed; } Right;
typedef struct { const float *bias; long N; } Part; /* bias (N) may be missing */

/* DEPTH columns or fewer of a term's a, from k on, and the rows of b that meet them. */
typedef struct { const float *a; long k, depth, lda; const Right *right; } Block;

_Static_assert(sizeof(Term) == 24 && sizeof(Right) == 24 && sizeof(Part) == 16, "amx.py fills them in as 8-byte fields");

/* Columns of a part, from n on, and where they go. */
typedef struct { long part, n, columns; float *c; } Panel;

/* Those of b in one part. */
typedef struct { const float *b; long depth, ld, transposed; } Rows;

/* Asks Linux for the tiles; 0 if it grants them. */
int request_tiles(void) {
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) != 0;
}

static void configure_tiles(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    _Static_assert(sizeof config == 64, "LDTILECFG reads 64 bytes");
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
    _tile_loadconfig(&config);
}

/* x0 and x1 in two bfloat16 each, high and low, in pairs: (x0[i], x1[i]) share the 32 bits of lane i. Rounds to
 * nearest by adding half of the last bit that stays; to a NaN nothing is added, for it might become a number. */
static inline void split(__m512 x0, __m512 x1, __m512i *high, __m512i *low) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(0xffff0000);
    __m512i h0 = _mm512_castps_si512(x0), h1 = _mm512_castps_si512(x1);
    h0 = _mm512_mask_add_epi32(h0, _mm512_cmp_ps_mask(x0, x0, _CMP_ORD_Q), h0, half);
    h1 = _mm512_mask_add_epi32(h1, _mm512_cmp_ps_mask(x1, x1, _CMP_ORD_Q), h1, half);
    h0 = _mm512_and_si512(h0, upper), h1 = _mm512_and_si512(h1, upper);
    __m512i l0 = _mm512_castps_si512(_mm512_sub_ps(x0, _mm512_castsi512_ps(h0)));
    __m512i l1 = _mm512_castps_si512(_mm512_sub_ps(x1, _mm512_castsi512_ps(h1)));
    l0 = _mm512_add_epi32(l0, half), l1 = _mm512_and_si512(_mm512_add_epi32(l1, half), upper);
    *high = _mm512_or_si512(_mm512_srli_epi32(h0, 16), h1);
    *low = _mm512_or_si512(_mm512_srli_epi32(l0, 16), l1);
}

/* `rows` of 16 rows of a block of a, for each 32 columns a tile of high and one of low parts. */
static void pack_a(const Block *x, const float *a, long rows, bf16 *to) {
    for (long k = 0; k < x->depth; k += 32, to += 2 * TILE)
        for (long m = 0; m < 16; m++) {
            __m512i high = _mm512_setzero_si512(), low = high;
            const float *row = a + m * x->lda + k;
            if (m < rows) split(load(row, x->depth - k), load(row + 16, x->depth - k - 16), &high, &low);
            _mm512_store_si512(to + 32 * m, high);
            _mm512_store_si512(to + 32 * m + TILE, low);
        }
}

/* 32 rows of b, from row k on, at 32 columns (fewer: zeros after them): tiles of the high parts of 16 columns and of
 * the next 16, then low. */
static void pack_b(const Rows *x, const float *b, long k, long columns, bf16 *to) {
    for (long i = 0; i < 16; i++)
        for (long n = 0; n < 2; n++) {
            const float *row = b + (k + i) * x->ld + 16 * n;
            __m512i high, low;
            split(load(row, k + i < x->depth ? columns - 16 * n : 0),
                  load(row + 16 * x->ld, k + i + 16 < x->depth ? columns - 16 * n : 0), &high, &low);
            _mm512_store_si512(to + n * TILE + 32 * i, high);
            _mm512_store_si512(to + (2 + n) * TILE + 32 * i, low);
        }
}

/* The same where b is stored transposed. */
static void pack_transposed(const Rows *x, const float *b, long k, long columns, bf16 *to) {
    for (long n = 0; n < 2; n++) {
        __m512i high[16], low[16];
        for (long i = 0; i < 16; i++) {
            const float *row = b + (16 * n + i) * x->ld + k;
            long left = 16 * n + i < columns ? x->depth - k : 0;
            split(load(row, left), load(row + 16, left - 16), high + i, low + i);
        }
        transpose(high, to + n * TILE, 64);
        transpose(low, to + (2 + n) * TILE, 64);
    }
}

/* A block's rows of b in a part, from a column on. */
static inline Rows rows_of(const Block *x, long part, long column) {
    const Right *r = x->right + part;
    return (Rows){r->b + (r->transposed ? column * r->ldb + x->k : x->k * r->ldb + column), x->depth, r->ldb, r->transposed};
}

/* c (32 rows if two, else 16; 32 columns), from zero on if fresh, += a block of a, whose second 16 rows follow the
 * first, times one of b. Small parts first. */
INLINE void multiply(const bf16 *a, const bf16 *b, long depth, float *c, int fresh, int two, Ahead *next, long lines) {
    if (fresh) {
        _tile_zero(0); _tile_zero(1);
        if (two) { _tile_zero(2); _tile_zero(3); }
    } else {
        _tile_loadd(0, c, 128); _tile_loadd(1, c + 16, 128);
        if (two) { _tile_loadd(2, c + 512, 128); _tile_loadd(3, c + 528, 128); }
    }
    for (long k = 0; k < depth; k += 32, a += 2 * TILE, b += 4 * TILE) {
        _tile_loadd(4, a + TILE, 64); _tile_loadd(6, b, 64); _tile_loadd(7, b + TILE, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); /* low a, high b */
        if (two) {
            _tile_loadd(5, a + BLOCK + TILE, 64);
            _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        if (next->left > 0) fetch(next, lines);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); /* high a, high b */
        if (two) {
            _tile_loadd(5, a + BLOCK, 64);
            _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_loadd(6, b + 2 * TILE, 64); _tile_loadd(7, b + 3 * TILE, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); /* high a, low b */
        if (two) { _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); }
    }
    _tile_stored(0, c, 128); _tile_stored(1, c + 16, 128);
    if (two) { _tile_stored(2, c + 512, 128); _tile_stored(3, c + 528, 128); }
}

/* c (M, columns of all parts) = sum of the terms, plus bias; `rights` holds the parts of the first term, then those of
 * the next. Rows of c lie ldc apart. What a row becomes depends on no other. Nonzero, and c as it was, where memory is
 * short. */
int matmul(const Term *terms, long count, const Right *rights, const Part *parts, long number, float *c, long M, long ldc,
           int threads) {
    long tiles = (M + 15) / 16, blocks = 0, panels = 0, together = NEAR / ((tiles + !tiles) * BLOCK * sizeof(bf16));
    for (long i = 0; i < count; i++) blocks += (terms[i].K + DEPTH - 1) / DEPTH;
    for (long i = 0; i < number; i++) panels += (parts[i].N + COLUMNS - 1) / COLUMNS;
    if (!M || !panels) return 0;
    together = together < 1 ? 1 : together > blocks ? blocks : together;
    Block *plan = malloc(blocks * sizeof(Block));
    Panel *panel = malloc(panels * sizeof(Panel));
    bf16 *packed = aligned_alloc(64, threads * together * tiles * BLOCK * sizeof(bf16));
    float *sums = aligned_alloc(64, threads * tiles * 16 * COLUMNS * sizeof(float));
    int failed = !plan || !panel || !packed || !sums;
    if (failed) goto end;
    Block *x = plan;
    for (long i = 0; i < count; i++)
        for (long k = 0; k < terms[i].K; k += DEPTH)
            *x++ = (Block){terms[i].a + k, k, terms[i].K - k < DEPTH ? terms[i].K - k : DEPTH, terms[i].lda,
                           rights + i * number};
    for (long part = 0, p = 0; part < number; c += parts[part++].N)
        for (long n = 0; n < parts[part].N; n += COLUMNS, p++) {
            panel[p].part = part, panel[p].n = n, panel[p].c = c + n;
            panel[p].columns = parts[part].N - n < COLUMNS ? parts[part].N - n : COLUMNS;
        }

    #pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        bf16 b[2 * DEPTH * COLUMNS] __attribute__((aligned(64)));
        _Static_assert(sizeof b == DEPTH / 32 * 4 * TILE * sizeof(bf16), "four tiles are packed for each 32 rows of b");
        /* Each thread packs all of a for itself: what another core has just written is slow to read. */
        bf16 *a = packed + omp_get_thread_num() * together * tiles * BLOCK;
        float *sum = sums + omp_get_thread_num() * tiles * 16 * COLUMNS;
        for (long start = 0; start < blocks; start += together) {
            long stop = start + together < blocks ? start + together : blocks;
            for (long j = start; j < stop; j++)
                for (long t = 0; t < tiles; t++)
                    pack_a(plan + j, plan[j].a + 16 * t * plan[j].lda, M - 16 * t, a + ((j - start) * tiles + t) * BLOCK);
            #pragma omp for schedule(static) nowait
            for (long p = 0; p < panels; p++) {
                long part = panel[p].part, n = panel[p].n, columns = panel[p].columns;
                float *c = panel[p].c;
                if (start)
                    for (long m = 0; m < M; m++)
                        for (long i = 0; i < columns; i += 16)
                            _mm512_store_ps(sum + m * COLUMNS + i, load(c + m * ldc + i, columns - i));
                for (long j = start; j < stop; j++) {
                    Rows now = rows_of(plan + j, part, n), then = {0};
                    for (long k = 0; k < now.depth; k += 32)
                        if (now.transposed) pack_transposed(&now, now.b, k, columns, b + k / 32 * 4 * TILE);
                        else pack_b(&now, now.b, k, columns, b + k / 32 * 4 * TILE);
                    if (j + 1 < stop) then = rows_of(plan + j + 1, part, n);
                    else if (p + 1 < panels) then = rows_of(plan + start, panel[p + 1].part, panel[p + 1].n);
                    Ahead next = {0};
                    if (then.b)
                        next = ahead_of(then.b, (then.transposed ? then.depth : COLUMNS) * sizeof(float),
                                        then.transposed ? COLUMNS : then.depth, then.ld * sizeof(float));
                    long lines = next.left / ((now.depth + 31) / 32 * ((tiles + 1) / 2)) + 1;
                    for (long t = 0; t < tiles; t += 2) {
                        const bf16 *high = a + ((j - start) * tiles + t) * BLOCK;
                        if (j + 1 == stop) /* what is written next */
                            for (long m = 16 * t; m < M && m < 16 * t + 32; m++) {
                                __builtin_prefetch(c + m * ldc, 1);
                                __builtin_prefetch(c + m * ldc + columns - 1, 1);
                            }
                        if (t + 1 < tiles) multiply(high, b, now.depth, sum + t * 16 * COLUMNS, !j, 1, &next, lines);
                        else multiply(high, b, now.depth, sum + t * 16 * COLUMNS, !j, 0, &next, lines);
                    }
                }
                for (long m = 0; m < M; m++)
                    for (long i = 0; i < columns; i += 16) {
                        __m512 y = _mm512_load_ps(sum + m * COLUMNS + i);
                        if (parts[part].bias && stop == blocks)
                            y = _mm512_add_ps(y, load(parts[part].bias + n + i, columns - i));
                        store(c + m * ldc + i, y, columns - i);
                    }
            }
        }
        _tile_release();
    }
end:
    free(plan), free(panel), free(packed), free(sums);
    return failed;
}
