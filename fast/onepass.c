/* Norms, activations, narrow products and attention in one pass over the numbers, on a CPU with AVX-512: see onepass.py.
 * Numbers are float32, rows contiguous where nothing else is said. */
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "avx512.h"

/* ---------------------------------------------------------------- prologues: see prologue.py
 *
 * Forward writes y. Backward is given x and the gradient of y; it writes y again and dx, the gradient of x. */

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

/* The mean of a row, and 1 / sqrt(mean((x - mean)^2) + eps). */
static inline void moments(const float *x, long n, float eps, float *mean, float *r) {
    __m512 sum = number(0), squares = number(0);
    for (long i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, load(x + i, n - i));
    *mean = _mm512_reduce_add_ps(sum) / n;
    for (long i = 0; i < n; i += 16) {
        __m512 d = _mm512_maskz_sub_ps(first(n - i), load(x + i, n - i), number(*mean));
        squares = _mm512_fmadd_ps(d, d, squares);
    }
    *r = 1 / sqrtf(_mm512_reduce_add_ps(squares) / n + eps);
}

/* y = weight (x - mean) r + bias, over rows of n */
void layer_norm(const float *x, const float *weight, const float *bias, float eps, float *y, long rows, long n, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long m = 0; m < rows; m++) {
        float mean, r;
        moments(x + m * n, n, eps, &mean, &r);
        for (long i = 0; i < n; i += 16) {
            __m512 u = _mm512_mul_ps(_mm512_sub_ps(load(x + m * n + i, n - i), number(mean)), number(r));
            store(y + m * n + i, _mm512_fmadd_ps(u, load(weight + i, n - i), load(bias + i, n - i)), n - i);
        }
    }
}

/* dx = r (g - mean(g) - u mean(g u)) with u = (x - mean) r, g = grad weight */
void layer_norm_backward(const float *x, const float *weight, const float *bias, float eps, const float *grad, float *y,
                         float *dx, long rows, long n, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long m = 0; m < rows; m++) {
        float mean, r;
        __m512 sum = number(0), products = number(0);
        moments(x + m * n, n, eps, &mean, &r);
        for (long i = 0; i < n; i += 16) {
            __m512 u = _mm512_mul_ps(_mm512_sub_ps(load(x + m * n + i, n - i), number(mean)), number(r));
            __m512 w = load(weight + i, n - i), g = _mm512_mul_ps(load(grad + m * n + i, n - i), w);
            sum = _mm512_add_ps(sum, g), products = _mm512_fmadd_ps(g, u, products);
            store(y + m * n + i, _mm512_fmadd_ps(u, w, load(bias + i, n - i)), n - i);
        }
        __m512 shift = number(_mm512_reduce_add_ps(sum) / n), slope = number(_mm512_reduce_add_ps(products) / n);
        for (long i = 0; i < n; i += 16) {
            __m512 u = _mm512_mul_ps(_mm512_sub_ps(load(x + m * n + i, n - i), number(mean)), number(r));
            __m512 g = _mm512_mul_ps(load(grad + m * n + i, n - i), load(weight + i, n - i));
            g = _mm512_fnmadd_ps(u, slope, _mm512_sub_ps(g, shift));
            store(dx + m * n + i, _mm512_mul_ps(number(r), g), n - i);
        }
    }
}

/* ---------------------------------------------------------------- matmuls with a narrow matrix: LoRA's A and B
 *
 * Each reads the wide matrix once for every RANKS of the rank. Where rows or ranks are left over, the last one is computed
 * several times and written once. */
#define RANKS 8
#define ROWS 3  /* sums of ROWS * RANKS vectors, and what is added, have 32 registers */
#define TALL 8  /* rows that share a vector of b */

/* Inlined with 16 for `left`, it has no mask. */
INLINE void add_products(__m512 sum[ROWS][RANKS], const float *const *row, const float *const *of, long i, long left) {
    __m512 v[ROWS];
    UNROLLED for (long j = 0; j < ROWS; j++) v[j] = load(row[j] + i, left);
    UNROLLED for (long k = 0; k < RANKS; k++) {
        __m512 w = load(of[k] + i, left);
        UNROLLED for (long j = 0; j < ROWS; j++) sum[j][k] = _mm512_fmadd_ps(v[j], w, sum[j][k]);
    }
}

/* h (rows, rank) = x a^T with x (rows, n), its rows ldx apart, and a (rank, n). */
void narrow(const float *x, long ldx, const float *a, float *h, long rows, long n, long rank, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long m = 0; m < rows; m += ROWS)
        for (long r = 0; r < rank; r += RANKS) {
            __m512 sum[ROWS][RANKS];
            const float *row[ROWS], *of[RANKS];
            UNROLLED for (long j = 0; j < ROWS; j++) row[j] = x + least(m + j, rows - 1) * ldx;
            UNROLLED for (long k = 0; k < RANKS; k++) of[k] = a + least(r + k, rank - 1) * n;
            UNROLLED for (long k = 0; k < RANKS; k++)
                UNROLLED for (long j = 0; j < ROWS; j++) sum[j][k] = number(0);
            long i = 0;
            for (; i + 16 <= n; i += 16) add_products(sum, row, of, i, 16);
            if (i < n) add_products(sum, row, of, i, n - i);
            UNROLLED for (long j = 0; j < ROWS; j++)
                UNROLLED for (long k = 0; k < RANKS; k++)
                    if (m + j < rows && r + k < rank) h[(m + j) * rank + r + k] = _mm512_reduce_add_ps(sum[j][k]);
        }
}

INLINE void add_updates(float *const *row, const float *const *of, const float *b, long count, long n, long rank, long i,
                        long left) {
    __m512 sum[TALL];
    UNROLLED for (long j = 0; j < TALL; j++) sum[j] = load(row[j] + i, left);
    for (long r = 0; r < rank; r++) {
        __m512 w = load(b + r * n + i, left);
        UNROLLED for (long j = 0; j < TALL; j++) sum[j] = _mm512_fmadd_ps(number(of[j][r]), w, sum[j]);
    }
    UNROLLED for (long j = 0; j < TALL; j++)
        if (j < count) store(row[j] + i, sum[j], left);
}

/* y (rows, n), its rows ldy apart, += h b with h (rows, rank) and b (rank, n). */
void update(float *y, long ldy, const float *h, const float *b, long rows, long n, long rank, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long m = 0; m < rows; m += TALL) {
        long i = 0;
        float *row[TALL];
        const float *of[TALL];
        for (long j = 0; j < TALL; j++) {
            long at = least(m + j, rows - 1);
            row[j] = y + at * ldy, of[j] = h + at * rank;
        }
        for (; i + 16 <= n; i += 16) add_updates(row, of, b, rows - m, n, rank, i, 16);
        if (i < n) add_updates(row, of, b, rows - m, n, rank, i, n - i);
    }
}

/* g (rank, n) = h^T x with h (rows, rank) and x (rows, n), its rows ldx apart. */
void outer(const float *h, const float *x, long ldx, float *g, long rows, long n, long rank, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i += 32)
        for (long r = 0; r < rank; r += RANKS) {
            __m512 sum[RANKS][2];
            long at[RANKS];
            for (long k = 0; k < RANKS; k++) sum[k][0] = sum[k][1] = number(0), at[k] = least(r + k, rank - 1);
            for (long m = 0; m < rows; m++) {
                __m512 v0 = load(x + m * ldx + i, n - i), v1 = load(x + m * ldx + i + 16, n - i - 16);
                for (long k = 0; k < RANKS; k++) {
                    __m512 w = number(h[m * rank + at[k]]);
                    sum[k][0] = _mm512_fmadd_ps(w, v0, sum[k][0]);
                    sum[k][1] = _mm512_fmadd_ps(w, v1, sum[k][1]);
                }
            }
            for (long k = 0; k < RANKS && r + k < rank; k++) {
                store(g + (r + k) * n + i, sum[k][0], n - i);
                if (n - i > 16) store(g + (r + k) * n + i + 16, sum[k][1], n - i - 16);
            }
        }
}

/* ---------------------------------------------------------------- attention to short chains of rows: see blocks.py
 *
 * Token i attends to length[i] rows: chain[start[i]] and those that follow it there, the last of which is its own.
 * q is (tokens, heads, size); k and v are (rows, groups, size), heads / groups heads sharing each. Rows lie ldq and
 * ldk numbers apart. Where cos and sin (rows, size) are given, q and k are rotated by their rows' angles first. */
typedef struct {
    const long *chain, *start, *length;
    float *q, *k, *v;
    const float *cos, *sin;
    long tokens, rows, heads, groups, size, ldq, ldk;
    float scale;
} Attention;

_Static_assert(sizeof(Attention) == 16 * 8, "onepass.py declares the same fields: 15 of 8 bytes, then scale, padded");

static inline float dot(const float *a, const float *b, long n) {
    __m512 sum = number(0);
    for (long i = 0; i < n; i += 16) sum = _mm512_fmadd_ps(load(a + i, n - i), load(b + i, n - i), sum);
    return _mm512_reduce_add_ps(sum);
}

/* Channels i and i + size / 2 of a head are one complex number, rotated by an angle, or back. */
static void rotate(float *x, const float *cos, const float *sin, float sign, long heads, long size) {
    for (long half = size / 2; heads > 0; heads--, x += size)
        for (long i = 0; i < half; i += 16) {
            __m512 a = load(x + i, half - i), b = load(x + half + i, half - i);
            __m512 c = load(cos + i, half - i), s = _mm512_mul_ps(number(sign), load(sin + i, half - i));
            store(x + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), half - i);
            store(x + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), half - i);
        }
}

/* q and k, or their gradients, in place. */
static void rotate_all(const Attention *x, float *q, float *k, float sign, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < x->tokens + x->rows; i++) {
        long row = i < x->tokens ? x->chain[x->start[i] + x->length[i] - 1] : i - x->tokens;
        float *numbers = i < x->tokens ? q + i * x->ldq : k + row * x->ldk;
        rotate(numbers, x->cos + row * x->size, x->sin + row * x->size, sign, i < x->tokens ? x->heads : x->groups, x->size);
    }
}

/* y (tokens, heads, size) = softmax(scale q k^T) v; lse (tokens, heads) is the logarithm of the softmax's denominator.
 * Nonzero, and nothing done, where memory is short; `longest` bounds length. */
int attend(const Attention *x, float *y, float *lse, long longest, int threads) {
    long size = x->size, space = (longest + 15) / 16 * 16, shared = x->heads / x->groups;
    float *weights = aligned_alloc(64, threads * space * sizeof(float));
    if (!weights) return 1;
    if (x->cos) rotate_all(x, x->q, x->k, 1, threads);
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
            sum += _mm512_mask_reduce_add_ps(first(count - j), e);
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

/* dq, dk and dv, laid out as q, k and v (which stay rotated), from grad, the gradient of y. With p the softmax:
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
                    long count = x->length[i], pair = offset[i] + h * count;
                    for (long j = 0; j < count; j++) {
                        long at = x->chain[x->start[i] + j] * x->ldk + column;
                        store(dk + at, _mm512_fmadd_ps(number(ds[pair + j]), q, load(dk + at, left)), left);
                        store(dv + at, _mm512_fmadd_ps(number(p[pair + j]), dy, load(dv + at, left)), left);
                    }
                }
        }
    }
    if (x->cos) rotate_all(x, dq, dk, -1, threads);
end:
    free(offset), free(p);
    return failed;
}
