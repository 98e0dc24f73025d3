/* What a training step computes on a CPU with AMX tiles: see amx.py. Numbers are float32, rows contiguous.
 *
 * Products take each number as the sum of two bfloat16: a = ah + al with ah = bf16(a), al = bf16(a - ah), b
 * likewise: 16 bits of the mantissa instead of 24. Then a b = ah bh + ah bl + al bh, and al bl, 2^-16 of it at most, is
 * left out (Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
 * Computations"). Tiles multiply bfloat16 and add up in float32.
 *
 * Frozen weights are split anew for every product: kept, their parts would take the weights' memory once more for each of
 * forward and backward, which want them in different orders.
 *
 * A tile holds 16 rows of 16 pairs of bfloat16. TDPBF16PS is c[m][n] += a[m][i].first b[i][n].first + the same of the
 * second, over i < 16, for 16 rows m and columns n. Here pair i is of k = i and k = i + 16, in a and in b: any order
 * will do, and this one needs no shuffling.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

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

/* What b's columns are packed from next: lines of 16 numbers, fetched while others are multiplied. */
typedef struct { const float *line; long column, width, ld, left; } Ahead;

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

/* The first `left` of 16 numbers, zeros after them. */
static inline __m512 load(const float *x, long left) {
    return left >= 16 ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(left > 0 ? (1 << left) - 1 : 0, x);
}

static inline void store(float *y, __m512 v, long left) {
    if (left >= 16) _mm512_storeu_ps(y, v);
    else _mm512_mask_storeu_ps(y, (1 << left) - 1, v);
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

/* Writes the transpose of a 16 x 16 matrix of 32-bit numbers. */
static inline void transpose(__m512i r[16], bf16 *to) {
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
        _mm512_store_si512(to + 32 * i, _mm512_shuffle_i32x4(even0, even1, 0x88));
        _mm512_store_si512(to + 32 * (i + 4), _mm512_shuffle_i32x4(odd0, odd1, 0x88));
        _mm512_store_si512(to + 32 * (i + 8), _mm512_shuffle_i32x4(even0, even1, 0xdd));
        _mm512_store_si512(to + 32 * (i + 12), _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
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
        transpose(high, to + n * TILE);
        transpose(low, to + (2 + n) * TILE);
    }
}

/* A block's rows of b in a part, from a column on. */
static inline Rows rows_of(const Block *x, long part, long column) {
    const Right *r = x->right + part;
    return (Rows){r->b + (r->transposed ? column * r->ldb + x->k : x->k * r->ldb + column), x->depth, r->ldb, r->transposed};
}

static Ahead ahead_of(const Rows *x) {
    long before = ((uintptr_t)x->b & 63) / sizeof(float); /* where b is not aligned */
    long width = (before + (x->transposed ? x->depth : COLUMNS) + 15) / 16 * 16;
    return (Ahead){x->b - before, 0, width, x->ld, (x->transposed ? COLUMNS : x->depth) * width / 16};
}

static inline void fetch(Ahead *next, long lines) {
    for (next->left -= lines; lines > 0; lines--) {
        _mm_prefetch((const char *)(next->line + next->column), _MM_HINT_T1);
        if ((next->column += 16) >= next->width) next->column = 0, next->line += next->ld;
    }
}

/* c (32 rows if two, else 16; 32 columns), from zero on if fresh, += a block of a, whose second 16 rows follow the
 * first, times one of b. Small parts first. */
static inline __attribute__((always_inline)) void multiply(const bf16 *a, const bf16 *b, long depth, float *c, int fresh,
                                                           int two, Ahead *next, long lines) {
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
                    if (then.b) next = ahead_of(&then);
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

/* ---------------------------------------------------------------- what stands before a product: see lora.py
 *
 * Forward writes y. Backward is given x and the gradient of y; it writes y again and dx, the gradient of x. */

static inline __m512 number(float x) { return _mm512_set1_ps(x); }

/* 2^n exp(r) with z = n ln 2 + r, and the Taylor series of exp(r), |r| < 0.35. */
static inline __m512 exponential(__m512 z) {
    z = _mm512_max_ps(number(-87), _mm512_min_ps(number(87), z)); /* keeps NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(z, number(1.44269504f)), 0), p = number(1.f / 5040);
    __m512 r = _mm512_fnmadd_ps(n, number(-2.12194440e-4f), _mm512_fnmadd_ps(n, number(0.693359375f), z));
    const float factorials[] = {720, 120, 24, 6, 2, 1, 1};
    for (int i = 0; i < 7; i++) p = _mm512_fmadd_ps(p, r, number(1 / factorials[i]));
    return _mm512_scalef_ps(p, n);
}

static inline __m512 sigmoid(__m512 x) {
    return _mm512_div_ps(number(1), _mm512_add_ps(number(1), exponential(_mm512_sub_ps(number(0), x))));
}

/* GELU's tanh form, y = x s with s = sigmoid(2 K (x + C x^3)). */
#define K2 1.5957691216f
#define C3 0.044715f

void gelu(const float *x, float *y, long count, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += 16) {
        __m512 v = load(x + i, count - i), square = _mm512_mul_ps(v, v);
        __m512 s = sigmoid(_mm512_mul_ps(v, _mm512_fmadd_ps(square, number(K2 * C3), number(K2))));
        store(y + i, _mm512_mul_ps(v, s), count - i);
    }
}

/* dy/dx = s + y (1 - s) slope, the slope of the sigmoid's argument. */
void gelu_backward(const float *x, const float *grad, float *y, float *dx, long count, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += 16) {
        __m512 v = load(x + i, count - i), square = _mm512_mul_ps(v, v);
        __m512 s = sigmoid(_mm512_mul_ps(v, _mm512_fmadd_ps(square, number(K2 * C3), number(K2))));
        __m512 out = _mm512_mul_ps(v, s), slope = _mm512_fmadd_ps(square, number(3 * K2 * C3), number(K2));
        __m512 d = _mm512_fmadd_ps(_mm512_fnmadd_ps(out, s, out), slope, s);
        store(y + i, out, count - i);
        store(dx + i, _mm512_mul_ps(d, load(grad + i, count - i)), count - i);
    }
}

/* y (rows, n) = silu(gate) up, with x (rows, 2 n): gate and up side by side; silu(g) = g sigmoid(g). */
void swiglu(const float *x, float *y, long rows, long n, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long m = 0; m < rows; m++)
        for (long i = 0; i < n; i += 16) {
            __m512 gate = load(x + 2 * m * n + i, n - i), up = load(x + (2 * m + 1) * n + i, n - i);
            store(y + m * n + i, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up), n - i);
        }
}

void swiglu_backward(const float *x, const float *grad, float *y, float *dx, long rows, long n, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long m = 0; m < rows; m++)
        for (long i = 0; i < n; i += 16) {
            __m512 gate = load(x + 2 * m * n + i, n - i), up = load(x + (2 * m + 1) * n + i, n - i);
            __m512 g = load(grad + m * n + i, n - i), s = sigmoid(gate), silu = _mm512_mul_ps(gate, s);
            __m512 slope = _mm512_add_ps(s, _mm512_fnmadd_ps(silu, s, silu)); /* s + silu (1 - s) */
            store(y + m * n + i, _mm512_mul_ps(silu, up), n - i);
            store(dx + 2 * m * n + i, _mm512_mul_ps(_mm512_mul_ps(g, up), slope), n - i);
            store(dx + (2 * m + 1) * n + i, _mm512_mul_ps(g, silu), n - i);
        }
}

/* 1 / sqrt(mean(x^2) + eps) */
static inline float inverse_rms(const float *x, long n, float eps) {
    __m512 sum = number(0);
    for (long i = 0; i < n; i += 16) {
        __m512 v = load(x + i, n - i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1 / sqrtf(_mm512_reduce_add_ps(sum) / n + eps);
}

/* y = weight x / rms(x), over rows of n */
void rms_norm(const float *x, const float *weight, float eps, float *y, long rows, long n, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long m = 0; m < rows; m++) {
        __m512 r = number(inverse_rms(x + m * n, n, eps));
        for (long i = 0; i < n; i += 16)
            store(y + m * n + i, _mm512_mul_ps(_mm512_mul_ps(load(x + m * n + i, n - i), r), load(weight + i, n - i)), n - i);
    }
}

/* dx = r (g - u mean(g u)) with r = 1 / rms(x), u = x r, g = grad weight */
void rms_norm_backward(const float *x, const float *weight, float eps, const float *grad, float *y, float *dx, long rows,
                       long n, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long m = 0; m < rows; m++) {
        __m512 r = number(inverse_rms(x + m * n, n, eps)), sum = number(0);
        for (long i = 0; i < n; i += 16) {
            __m512 u = _mm512_mul_ps(load(x + m * n + i, n - i), r), w = load(weight + i, n - i);
            sum = _mm512_fmadd_ps(_mm512_mul_ps(load(grad + m * n + i, n - i), w), u, sum);
            store(y + m * n + i, _mm512_mul_ps(u, w), n - i);
        }
        __m512 mean = number(_mm512_reduce_add_ps(sum) / n);
        for (long i = 0; i < n; i += 16) {
            __m512 u = _mm512_mul_ps(load(x + m * n + i, n - i), r);
            __m512 g = _mm512_mul_ps(load(grad + m * n + i, n - i), load(weight + i, n - i));
            store(dx + m * n + i, _mm512_mul_ps(r, _mm512_fnmadd_ps(u, mean, g)), n - i);
        }
    }
}

/* ---------------------------------------------------------------- attention to short chains of rows: see fused.py
 *
 * Token i attends to length[i] rows: chain[start[i]] and those that follow it there, the last of which is its own.
 * q is (tokens, heads, size); k and v are (rows, groups, size), heads / groups heads sharing each. Rows lie ldq and
 * ldk numbers apart. Where cos and sin (rows, size) are given, q and k are turned by their rows' angles first. */
typedef struct {
    const long *chain, *start, *length;
    float *q, *k, *v;
    const float *cos, *sin;
    long tokens, rows, heads, groups, size, ldq, ldk;
    float scale;
} Attention;

_Static_assert(sizeof(Attention) == 16 * 8, "amx.py declares the same fields: 15 of 8 bytes, then scale, padded");

static inline float dot(const float *a, const float *b, long n) {
    __m512 sum = number(0);
    for (long i = 0; i < n; i += 16) sum = _mm512_fmadd_ps(load(a + i, n - i), load(b + i, n - i), sum);
    return _mm512_reduce_add_ps(sum);
}

/* Channels i and i + size / 2 of a head are one complex number: turned by an angle, or back. */
static void turn(float *x, const float *cos, const float *sin, float sign, long heads, long size) {
    for (long half = size / 2; heads > 0; heads--, x += size)
        for (long i = 0; i < half; i += 16) {
            __m512 a = load(x + i, half - i), b = load(x + half + i, half - i);
            __m512 c = load(cos + i, half - i), s = _mm512_mul_ps(number(sign), load(sin + i, half - i));
            store(x + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), half - i);
            store(x + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), half - i);
        }
}

/* q and k, or their gradients, in place. */
static void turn_all(const Attention *x, float *q, float *k, float sign, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < x->tokens + x->rows; i++) {
        long row = i < x->tokens ? x->chain[x->start[i] + x->length[i] - 1] : i - x->tokens;
        float *numbers = i < x->tokens ? q + i * x->ldq : k + row * x->ldk;
        turn(numbers, x->cos + row * x->size, x->sin + row * x->size, sign, i < x->tokens ? x->heads : x->groups, x->size);
    }
}

/* y (tokens, heads, size) = softmax(scale q k^T) v; lse (tokens, heads) is the logarithm of the softmax's denominator.
 * Nonzero, and nothing done, where memory is short; `longest` bounds length. */
int attend(const Attention *x, float *y, float *lse, long longest, int threads) {
    long size = x->size, space = (longest + 15) / 16 * 16, shared = x->heads / x->groups;
    float *weights = aligned_alloc(64, threads * space * sizeof(float));
    if (!weights) return 1;
    if (x->cos) turn_all(x, x->q, x->k, 1, threads);
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < x->tokens * x->heads; task++) {
        long i = task / x->heads, h = task % x->heads, count = x->length[i], column = h / shared * size;
        const long *chain = x->chain + x->start[i];
        float *weight = weights + omp_get_thread_num() * space, largest = -INFINITY, sum = 0;
        for (long j = 0; j < count; j++) {
            weight[j] = x->scale * dot(x->q + i * x->ldq + h * size, x->k + chain[j] * x->ldk + column, size);
            largest = weight[j] > largest ? weight[j] : largest;
        }
        for (long j = 0; j < count; j += 16) {
            __m512 e = exponential(_mm512_sub_ps(load(weight + j, count - j), number(largest)));
            store(weight + j, e, count - j);
            sum += _mm512_mask_reduce_add_ps(count - j >= 16 ? 0xffff : (1 << (count - j)) - 1, e);
        }
        for (long n = 0; n < size; n += 16) {
            __m512 total = number(0);
            for (long j = 0; j < count; j++)
                total = _mm512_fmadd_ps(number(weight[j]), load(x->v + chain[j] * x->ldk + column + n, size - n), total);
            store(y + task * size + n, _mm512_div_ps(total, number(sum)), size - n);
        }
        lse[task] = largest + logf(sum);
    }
    free(weights);
    return 0;
}

/* dq, dk and dv, laid out as q, k and v (which stay turned), from grad, the gradient of y. With p the softmax:
 * dv = p^T grad, ds = p (grad v^T - sum(grad y)), dq = scale ds k, dk = scale ds^T q (Dao 2023, FlashAttention-2). */
int attend_backward(const Attention *x, const float *y, const float *lse, const float *grad, float *dq, float *dk, float *dv,
                    int threads) {
    long size = x->size, heads = x->heads, shared = heads / x->groups, parts = (size + 15) / 16, pairs = 0;
    long *offset = malloc(x->tokens * sizeof(long));
    for (long i = 0; offset && i < x->tokens; i++) offset[i] = pairs * heads, pairs += x->length[i];
    float *p = malloc(2 * pairs * heads * sizeof(float)), *ds = p ? p + pairs * heads : NULL;
    int failed = !offset || !p;
    if (failed) goto end;

    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for
        for (long task = 0; task < x->tokens * heads; task++) {
            long i = task / heads, h = task % heads, count = x->length[i], column = h / shared * size;
            const long *chain = x->chain + x->start[i];
            const float *q = x->q + i * x->ldq + h * size, *g = grad + task * size;
            float *mine = p + offset[i] + h * count, *slope = ds + offset[i] + h * count, sum = dot(g, y + task * size, size);
            for (long j = 0; j < count; j++) mine[j] = x->scale * dot(q, x->k + chain[j] * x->ldk + column, size);
            for (long j = 0; j < count; j += 16)
                store(mine + j, exponential(_mm512_sub_ps(load(mine + j, count - j), number(lse[task]))), count - j);
            for (long j = 0; j < count; j++)
                slope[j] = x->scale * mine[j] * (dot(g, x->v + chain[j] * x->ldk + column, size) - sum);
            for (long n = 0; n < size; n += 16) {
                __m512 total = number(0);
                for (long j = 0; j < count; j++)
                    total = _mm512_fmadd_ps(number(slope[j]), load(x->k + chain[j] * x->ldk + column + n, size - n), total);
                store(dq + i * x->ldq + h * size + n, total, size - n);
            }
        }
        #pragma omp for /* each task has 16 channels of dk and dv for itself */
        for (long task = 0; task < x->groups * parts; task++) {
            long g = task / parts, n = task % parts * 16, left = size - n, column = g * size + n;
            for (long row = 0; row < x->rows; row++) {
                store(dk + row * x->ldk + column, number(0), left);
                store(dv + row * x->ldk + column, number(0), left);
            }
            for (long i = 0; i < x->tokens; i++)
                for (long h = g * shared; h < (g + 1) * shared; h++) {
                    __m512 q = load(x->q + i * x->ldq + h * size + n, left), dy = load(grad + (i * heads + h) * size + n, left);
                    long count = x->length[i], first = offset[i] + h * count;
                    for (long j = 0; j < count; j++) {
                        long at = x->chain[x->start[i] + j] * x->ldk + column;
                        store(dk + at, _mm512_fmadd_ps(number(ds[first + j]), q, load(dk + at, left)), left);
                        store(dv + at, _mm512_fmadd_ps(number(p[first + j]), dy, load(dv + at, left)), left);
                    }
                }
        }
    }
    if (x->cos) turn_all(x, dq, dk, -1, threads);
end:
    free(offset), free(p);
    return failed;
}
