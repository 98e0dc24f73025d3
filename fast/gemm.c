/* Products of float32 activations and wide weights, float32 or bfloat16, by AVX-512: see gemm.py.
 *
 * Rows of a and columns of b are packed into blocks that stay in the caches, as items of 32 bits: a float32 number, or a
 * pair of bfloat16 that are neighbours along K, of which VDPBF16PS adds up both products. While a block of b is multiplied
 * by all rows of a, the next one is fetched from memory. After Goto and van de Geijn 2008, "Anatomy of High-Performance
 * Matrix Multiplication".
 */
#include <omp.h>
#include <stdlib.h>

#include "avx512.h"

#define ROWS 12           /* of a that are multiplied at a time: ROWS * WIDE sums, and what is added, have 32 registers */
#define WIDE 2            /* vectors of columns of b, likewise */
#define COLUMNS (16 * WIDE)
#define DEPTH 256         /* items of a column of b in a block: 32 KiB, which stay in the nearest cache */
#define NEAR (640 << 10)  /* bytes of packed a that stay in the second cache while b passes by */
#define MANY 384          /* rows of a that are packed at a time */

_Static_assert(MANY * DEPTH * 4 <= NEAR, "one block at least of a's rows is packed");
_Static_assert(DEPTH % 16 == 0, "blocks are packed 16 items at a time");

/* scaling h b, added to some columns of the result: h is (M, rank), its rows ldh numbers apart, b (rank, columns). */
typedef struct { const float *h, *b; long ldh, rank, start, columns; float scaling; } Update;

/* c (M, N) = a (M, K) b (K, N) + bias + updates; c is added to if `add`. b is stored as (N, K) if transposed, in bfloat16 if
 * rough. Rows lie lda, ldb and ldc numbers apart. */
typedef struct {
    const float *a;
    const void *b;
    const float *bias; /* (N,), or missing */
    float *c;
    const Update *updates;
    long M, N, K, lda, ldb, ldc, transposed, rough, add, count;
} Product;

_Static_assert(sizeof(Update) == 56 && sizeof(Product) == 120, "gemm.py declares the same fields");

/* Where a tile of the result goes, and what is added to it. `mine` are the columns that exist. */
typedef struct {
    float *c;
    long ldc, n;
    int fresh, last; /* whether the sums begin here, and whether they end here */
    __mmask16 mine[WIDE];
} Tile;

/* ROWS rows or fewer of c (+)= a block of a times one of b, depth items each. */
INLINE void multiply(long rows, int rough, const uint32_t *a, const uint32_t *b, long depth, const Product *x, long m, Tile t,
                     Ahead *next, long lines) {
    __m512 sum[ROWS][WIDE];
    float *c = t.c;
    UNROLLED for (long i = 0; i < rows; i++) {
        UNROLLED for (long j = 0; j < WIDE; j++) sum[i][j] = number(0);
        __builtin_prefetch(c + i * t.ldc, 1), __builtin_prefetch(c + i * t.ldc + COLUMNS - 1, 1);
    }
    for (long k = 0; k < depth; k++, b += COLUMNS) {
        __m512i w[WIDE];
        UNROLLED for (long j = 0; j < WIDE; j++) w[j] = _mm512_load_si512(b + 16 * j);
        UNROLLED for (long i = 0; i < rows; i++) {
            __m512i v = _mm512_set1_epi32(a[i * DEPTH + k]);
            UNROLLED for (long j = 0; j < WIDE; j++)
                sum[i][j] = rough ? _mm512_dpbf16_ps(sum[i][j], (__m512bh)v, (__m512bh)w[j])
                                  : _mm512_fmadd_ps(_mm512_castsi512_ps(v), _mm512_castsi512_ps(w[j]), sum[i][j]);
        }
        if (!(k & 7) && next->left > 0) fetch(next, lines);
    }
    if (!t.fresh)
        UNROLLED for (long i = 0; i < rows; i++)
            UNROLLED for (long j = 0; j < WIDE; j++)
                sum[i][j] = _mm512_add_ps(sum[i][j], _mm512_maskz_loadu_ps(t.mine[j], c + i * t.ldc + 16 * j));
    if (t.last) {
        for (const Update *u = x->updates; u < x->updates + x->count; u++) {
            long at = t.n - u->start; /* of this tile in b: negative where the tile begins before it */
            if (at + COLUMNS <= 0 || at >= u->columns) continue;
            __mmask16 in[WIDE];
            for (long j = 0; j < WIDE; j++) in[j] = first(u->columns - at - 16 * j) & ~first(-at - 16 * j);
            for (long r = 0; r < u->rank; r++) {
                const float *row = u->b + r * u->columns + at, *h = u->h + m * u->ldh + r;
                __m512 w[WIDE];
                UNROLLED for (long j = 0; j < WIDE; j++)
                    w[j] = _mm512_mul_ps(number(u->scaling), _mm512_maskz_loadu_ps(in[j], row + 16 * j));
                UNROLLED for (long i = 0; i < rows; i++)
                    UNROLLED for (long j = 0; j < WIDE; j++) sum[i][j] = _mm512_fmadd_ps(number(h[i * u->ldh]), w[j], sum[i][j]);
            }
        }
        if (x->bias)
            UNROLLED for (long j = 0; j < WIDE; j++) {
                __m512 bias = _mm512_maskz_loadu_ps(t.mine[j], x->bias + t.n + 16 * j);
                UNROLLED for (long i = 0; i < rows; i++) sum[i][j] = _mm512_add_ps(sum[i][j], bias);
            }
    }
    UNROLLED for (long i = 0; i < rows; i++)
        UNROLLED for (long j = 0; j < WIDE; j++) _mm512_mask_storeu_ps(c + i * t.ldc + 16 * j, t.mine[j], sum[i][j]);
}

/* `multiply` for each number of rows: their sums are in registers only if the compiler knows how many there are. */
#define EACH(f) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) /* to ROWS */
#define MULTIPLY(rows) \
    static void exact##rows(const uint32_t *a, const uint32_t *b, long depth, const Product *x, long m, Tile t, Ahead *next, \
                            long lines) { multiply(rows, 0, a, b, depth, x, m, t, next, lines); } \
    static void rough##rows(const uint32_t *a, const uint32_t *b, long depth, const Product *x, long m, Tile t, Ahead *next, \
                            long lines) { multiply(rows, 1, a, b, depth, x, m, t, next, lines); }
EACH(MULTIPLY)
#define EXACT(rows) exact##rows,
#define ROUGH(rows) rough##rows,
typedef void Multiply(const uint32_t *, const uint32_t *, long, const Product *, long, Tile, Ahead *, long);
static Multiply *const multiplies[2][ROWS + 1] = {{0, EACH(EXACT)}, {0, EACH(ROUGH)}};

/* The mask of the first `left` of 32 numbers. */
static inline __mmask32 first32(long left) { return first(left) | (__mmask32)first(left - 16) << 16; }

/* So many numbers of each of some rows of a, DEPTH items for each row; returns where the next may stand. */
static uint32_t *pack_a(const Product *x, const float *a, long rows, long numbers, uint32_t *to) {
    for (; rows > 0; rows--, a += x->lda, to += DEPTH)
        if (x->rough)
            for (long k = 0; k < numbers; k += 32) {
                __m512bh pairs = _mm512_cvtne2ps_pbh(load(a + k + 16, numbers - k - 16), load(a + k, numbers - k));
                _mm512_store_si512(to + k / 2, (__m512i)pairs);
            }
        else
            for (long k = 0; k < numbers; k += 16) _mm512_store_ps(to + k, load(a + k, numbers - k));
    return to;
}

/* So many numbers of each of COLUMNS columns of b, zeros for those that do not exist, one item of each after the other. */
static void pack_b(const Product *x, const char *b, long columns, long numbers, uint32_t *to) {
    const __m512i pairs = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
                                           4, 35, 3, 34, 2, 33, 1, 32, 0); /* of the first 16 of two rows */
    long depth = (numbers + x->rough) / (1 + x->rough), distance = x->ldb * (x->rough ? 2 : 4);
    if (x->transposed)
        for (long k = 0; k < depth; k += 16)
            for (long n = 0; n < COLUMNS; n += 16) {
                __m512i r[16];
                for (long i = 0; i < 16; i++) {
                    const char *row = b + (n + i) * distance + k * 4;
                    r[i] = _mm512_setzero_si512();
                    if (n + i >= columns) continue;
                    if (!x->rough) r[i] = _mm512_castps_si512(load((const float *)row, numbers - k));
                    else r[i] = _mm512_maskz_loadu_epi16(first32(numbers - 2 * k), row);
                }
                transpose(r, to + k * COLUMNS + n, COLUMNS * 4);
            }
    else if (x->rough)
        for (long k = 0; k < numbers; k += 2)
            for (long n = 0; n < COLUMNS; n += 16, to += 16) {
                const char *row = b + k * distance + 2 * n;
                __m256i u = _mm256_maskz_loadu_epi16(first(columns - n), row);
                __m256i v = _mm256_maskz_loadu_epi16(k + 1 < numbers ? first(columns - n) : 0, row + distance);
                _mm512_store_si512(to, _mm512_permutex2var_epi16(_mm512_castsi256_si512(u), pairs, _mm512_castsi256_si512(v)));
            }
    else
        for (long k = 0; k < numbers; k++)
            for (long n = 0; n < COLUMNS; n += 16, to += 16)
                _mm512_store_ps(to, load((const float *)(b + k * distance) + n, columns - n));
}

/* Where the number of b's row k and column n stands. */
#define AT(k, n) ((const char *)x->b + (x->transposed ? (n) * x->ldb + (k) : (k) * x->ldb + (n)) * (x->rough ? 2 : 4))

/* Some rows of a, packed, and some blocks of their columns: of `numbers` columns each, from block `start` to before `stop`. */
typedef struct { const uint32_t *a; long m, rows, start, stop, numbers, blocks; } Part;

/* Multiplies them by COLUMNS columns of b, from n on. */
static void multiply_part(const Product *x, const Part *part, long n) {
    uint32_t b[DEPTH * COLUMNS] __attribute__((aligned(64)));
    const uint32_t *a = part->a;
    long columns = least(COLUMNS, x->N - n), groups = (part->rows + ROWS - 1) / ROWS;
    for (long j = part->start; j < part->stop; j++) {
        long k = j * part->numbers, numbers = least(part->numbers, x->K - k), depth = (numbers + x->rough) / (1 + x->rough);
        pack_b(x, AT(k, n), columns, numbers, b);

        long then = j + 1 < part->stop ? k + part->numbers : part->start * part->numbers; /* the next block's row, column */
        long beside = j + 1 < part->stop ? n : n + COLUMNS;
        Ahead next = {0};
        if (beside < x->N) {
            long deep = least(part->numbers, x->K - then), wide = least(COLUMNS, x->N - beside), bytes = x->rough ? 2 : 4;
            next = ahead_of(AT(then, beside), (x->transposed ? deep : wide) * bytes, x->transposed ? wide : deep,
                            x->ldb * bytes);
        }
        long lines = next.left / ((depth / 8 + 1) * groups) + 1; /* `multiply` fetches every 8 items */
        for (long g = 0; g < groups; g++) {
            long from = g * part->rows / groups, rows = (g + 1) * part->rows / groups - from, m = part->m + from;
            Tile t = {x->c + m * x->ldc + n, x->ldc, n, !j && !x->add, j + 1 == part->blocks, {0}};
            for (long i = 0; i < WIDE; i++) t.mine[i] = first(columns - 16 * i);
            multiplies[x->rough][rows](a, b, depth, x, m, t, &next, lines);
            a += rows * DEPTH;
        }
    }
}

/* What a row becomes depends on no other row, nor on the number of threads. Nonzero, and c as it was, where memory is
 * short. */
int product(const Product *x, int threads) {
    long items = (x->K + x->rough) / (1 + x->rough), blocks = items ? (items + DEPTH - 1) / DEPTH : 1;
    long numbers = (items + 16 * blocks - 1) / (16 * blocks) * 16 * (1 + x->rough); /* blocks are about equally deep */
    long chunks = (x->M + MANY - 1) / MANY, most = chunks ? (x->M + chunks - 1) / chunks : 0; /* rows of a chunk */
    if (!x->M || !x->N) return 0;
    long together = least(blocks, NEAR / (most * DEPTH * 4)), size = most * together * DEPTH;
    uint32_t *packed = aligned_alloc(64, threads * size * 4);
    if (!packed) return 1;

    #pragma omp parallel num_threads(threads)
    {
        /* Each thread packs all of a for itself: what another core has just written is slow to read. */
        uint32_t *a = packed + omp_get_thread_num() * size;
        for (long chunk = 0; chunk < chunks; chunk++)
            for (long start = 0; start < blocks; start += together) {
                long m = chunk * x->M / chunks, rows = (chunk + 1) * x->M / chunks - m;
                Part part = {a, m, rows, start, least(blocks, start + together), numbers, blocks};
                uint32_t *to = a;
                for (long j = start; j < part.stop; j++)
                    to = pack_a(x, x->a + m * x->lda + j * numbers, rows, least(numbers, x->K - j * numbers), to);
                #pragma omp for schedule(static) nowait /* the same columns each time: they are added to */
                for (long n = 0; n < x->N; n += COLUMNS) multiply_part(x, &part, n);
            }
    }
    free(packed);
    return 0;
}
