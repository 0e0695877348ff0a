/* Attention of the last few tokens over all keys and values, which are read where they lie, each once.
 *
 * Queries whose heads share a key head pass over it together. A key head is done by one thread, and its sums are made in
 * float32 in one order, that of keys: the result depends neither on the number of threads nor on what else is in the batch.
 * Written with the compiler's vectors, once for every CPU.
 */
#include <math.h>
#include <stdlib.h>

#include "floats.h"
#include "team.h"

#pragma GCC diagnostic ignored "-Wpsabi" /* how vectors are passed does not matter: every function that takes one is inlined */

enum { LANES = 16, BLOCK = 4, KEYS = 16 }; /* floats in a vector; vectors, or queries, held in registers; keys in one pass */

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t whole __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

struct tensor { /* (batch, heads, tokens, width), the width contiguous */
    const char *at;
    int64_t batch, heads, tokens, width;
    int64_t batch_step, head_step, token_step; /* in elements */
};

struct attention {
    struct tensor q, k, v;
    const char *mask;                     /* (batch, heads, queries, keys): whether, or what is added; or NULL */
    int64_t mask_steps[4];                /* in elements */
    int32_t mask_dtype, dtype;            /* 1: bool */
    float scale;
    float *room;                          /* (threads, what a unit needs) */
    int64_t room_step;
    char *y;                              /* (batch, queries, heads, width of v) */
};

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (whole){__VA_ARGS__})
#endif
/* a and b, each folded in halves of `step` lanes: what is left of a and b lies in alternating stretches. */
#define FOLD8(a, b) (SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define FOLD4(a, b) (SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) + SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
#define FOLD2(a, b) (SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) + SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#define FOLD1(a, b) (SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) + SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))

/* The sums of 16 vectors, in their order. */
INLINE void sums_of(const lanes *v, float *out) {
    lanes eight[8], four[4], two[2]; /* number i folds with i + 8, so that the last fold leaves them in order */
    UNROLL for (int i = 0; i < 8; i++) eight[i] = FOLD8(v[i], v[i + 8]);
    UNROLL for (int i = 0; i < 4; i++) four[i] = FOLD4(eight[i], eight[i + 4]);
    UNROLL for (int i = 0; i < 2; i++) two[i] = FOLD2(four[i], four[i + 2]);
    lanes one = FOLD1(two[0], two[1]);
    memcpy(out, &one, sizeof one);
}

INLINE lanes load(const char *p, int dtype) {
    if (dtype == FP32) {
        lanes v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    halves h;
    memcpy(&h, p, sizeof h);
    whole wide = __builtin_convertvector(h, whole) << 16;
    lanes v;
    memcpy(&v, &wide, sizeof v);
    return v;
}

/* Number `c` of the vectors of a row: what is behind its end is zero. */
INLINE lanes load_some(const char *row, int64_t c, int64_t width, int dtype) {
    int64_t left = width - c * LANES;
    if (left >= LANES) return load(row + c * LANES * dtype, dtype);
    char some[LANES * FP32] = {0};
    memcpy(some, row + c * LANES * dtype, (size_t)(left * dtype));
    return load(some, dtype);
}

/* e^x for x ≤ 0: 2^n e^r with x = n ln 2 + r, |r| ≤ ½ ln 2; to a few units of the last place, and 0 below -87. */
INLINE lanes power(lanes x) {
    const float shift = 12582912.0f;
    lanes shifted = x * 1.44269504f + shift, n = shifted - shift;
    lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    lanes p = 1 + r * (1 + r * (0.5f + r * (0.16666667f + r * (0.041666667f + r * (0.0083333333f + r * 0.0013888889f)))));
    whole bits, low = x < -87.0f;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23; /* the integer n lies in the low bits of `shifted` */
    lanes scale;
    memcpy(&scale, &bits, sizeof scale);
    p *= scale;
    memcpy(&bits, &p, sizeof bits);
    bits &= ~low;
    memcpy(&p, &bits, sizeof p);
    return p;
}

static const char *row_of(const struct tensor *t, int64_t batch, int64_t head, int64_t token, int dtype) {
    return t->at + (batch * t->batch_step + head * t->head_step + token * t->token_step) * dtype;
}

/* Scores (rows, stride) of the queries `q` (rows, vectors) with a key head. */
INLINE void score(const struct attention *a, int64_t batch, int64_t head, const lanes *q, int64_t rows, float *scores,
                  int64_t stride, lanes *wide, const int64_t vectors, int dtype) {
    int64_t keys = a->k.tokens;
    for (int64_t t = 0; t < keys; t += KEYS) {
        for (int i = 0; i < KEYS; i++) { /* in float32 once for all queries */
            const char *row = row_of(&a->k, batch, head, t + i < keys ? t + i : keys - 1, dtype);
            for (int64_t c = 0; c < vectors; c++) wide[i * vectors + c] = load_some(row, c, a->k.width, dtype);
        }
        for (int64_t r = 0; r < rows; r++) {
            lanes sum[KEYS];
            for (int i = 0; i < KEYS; i++) {
                sum[i] = q[r * vectors] * wide[i * vectors];
                for (int64_t c = 1; c < vectors; c++) sum[i] += q[r * vectors + c] * wide[i * vectors + c];
            }
            sums_of(sum, scores + r * stride + t);
        }
    }
}

/* Scores become what they weigh, e^(score - the largest); the sum of it. 0 where nothing is to be looked at. */
INLINE float weigh(const struct attention *a, int64_t batch, int64_t head, int64_t query, float *scores) {
    int64_t keys = a->k.tokens, padded = (keys + LANES - 1) / LANES * LANES;
    float most = -INFINITY;
    lanes total = {0};
    for (int64_t t = 0; t < keys; t++) {
        scores[t] *= a->scale;
        if (a->mask) {
            int64_t at = batch * a->mask_steps[0] + head * a->mask_steps[1] + query * a->mask_steps[2] + t * a->mask_steps[3];
            if (a->mask_dtype == 1) scores[t] = a->mask[at] ? scores[t] : -INFINITY;
            else scores[t] += get(a->mask, at, a->mask_dtype);
        }
    }
    for (int64_t t = 0; t < keys; t++) most = scores[t] > most ? scores[t] : most;
    for (int64_t t = keys; t < padded; t++) scores[t] = -INFINITY;
    float base = most == -INFINITY ? 0 : most;
    for (int64_t t = 0; t < padded; t += LANES) {
        lanes v;
        memcpy(&v, scores + t, sizeof v);
        v = power(v - base);
        total += v;
        memcpy(scores + t, &v, sizeof v);
    }
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += total[l];
    return sum;
}

/* Σ weight · value over all keys, for `count` rows of weights and `vectors` vectors of the width from `first` on. */
INLINE void gather(const struct attention *a, int64_t batch, int64_t head, const float *weights, int64_t stride, int64_t first,
                   lanes (*sum)[BLOCK], const int count, const int vectors, int dtype) {
    int64_t keys = a->v.tokens, width = a->v.width;
    for (int r = 0; r < count; r++)
        for (int c = 0; c < vectors; c++) sum[r][c] = (lanes){0};
    for (int64_t t = 0; t < keys; t++) {
        const char *row = row_of(&a->v, batch, head, t, dtype);
        lanes value[BLOCK];
        for (int c = 0; c < vectors; c++) value[c] = load_some(row, first + c, width, dtype);
        for (int r = 0; r < count; r++)
            for (int c = 0; c < vectors; c++) sum[r][c] += weights[r * stride + t] * value[c];
    }
}

/* `count` rows of weights with `vectors` vectors of the values, and on to y. */
INLINE void weighted(const struct attention *a, int64_t batch, int64_t head, const float *weights, const float *totals,
                     int64_t stride, int64_t row, int64_t first, const int count, const int vectors, int dtype) {
    int64_t queries = a->q.tokens, shared = a->q.heads / a->k.heads, width = a->v.width;
    lanes sum[BLOCK][BLOCK];
    gather(a, batch, head, weights + row * stride, stride, first, sum, count, vectors, dtype);
    for (int r = 0; r < count; r++) {
        int64_t own = head * shared + (row + r) / queries, query = (row + r) % queries;
        char *y = a->y + ((batch * queries + query) * a->q.heads + own) * width * dtype;
        float total = totals[row + r], share = total == 0 ? 0 : 1 / total;
        for (int64_t c = first * LANES; c < (first + vectors) * LANES && c < width; c++)
            put(y, c, dtype, sum[r][c / LANES - first][c % LANES] * share);
    }
}

/* All queries of a key head: unit number `unit` of batch · key heads. */
INLINE void attend(const struct attention *a, int64_t unit, float *room, int dtype) {
    int64_t batch = unit / a->k.heads, head = unit % a->k.heads, queries = a->q.tokens, shared = a->q.heads / a->k.heads;
    int64_t rows = shared * queries, stride = (a->k.tokens + KEYS - 1) / KEYS * KEYS;
    int64_t vectors = (a->k.width + LANES - 1) / LANES, columns = (a->v.width + LANES - 1) / LANES;
    lanes *q = (lanes *)room, *wide = q + rows * vectors;
    float *scores = (float *)(wide + KEYS * vectors), *totals = scores + rows * stride;
    for (int64_t r = 0; r < rows; r++) {
        const char *row = row_of(&a->q, batch, head * shared + r / queries, r % queries, dtype);
        for (int64_t c = 0; c < vectors; c++) q[r * vectors + c] = load_some(row, c, a->q.width, dtype);
    }
    if (vectors == 4) score(a, batch, head, q, rows, scores, stride, wide, 4, dtype);
    else if (vectors == 8) score(a, batch, head, q, rows, scores, stride, wide, 8, dtype);
    else score(a, batch, head, q, rows, scores, stride, wide, vectors, dtype);
    for (int64_t r = 0; r < rows; r++)
        totals[r] = weigh(a, batch, head * shared + r / queries, r % queries, scores + r * stride);
    for (int64_t first = 0; first < columns;) {
        int64_t taken = columns - first < BLOCK ? 1 : BLOCK;
        for (int64_t r = 0; r < rows;) {
            int64_t count = rows - r < BLOCK ? 1 : BLOCK;
            if (taken == BLOCK && count == BLOCK) weighted(a, batch, head, scores, totals, stride, r, first, BLOCK, BLOCK, dtype);
            else if (taken == BLOCK) weighted(a, batch, head, scores, totals, stride, r, first, 1, BLOCK, dtype);
            else if (count == BLOCK) weighted(a, batch, head, scores, totals, stride, r, first, BLOCK, 1, dtype);
            else weighted(a, batch, head, scores, totals, stride, r, first, 1, 1, dtype);
            r += count;
        }
        first += taken;
    }
}

typedef void unit_kernel(const struct attention *a, int64_t unit, float *room);
#define KERNEL(name, target)                                                                                          \
    target static void name##_bf16(const struct attention *a, int64_t unit, float *room) { attend(a, unit, room, BF16); } \
    target static void name##_fp32(const struct attention *a, int64_t unit, float *room) { attend(a, unit, room, FP32); }

KERNEL(portable, )
static int always(void) { return 1; }
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define X86 1
#include "avx.h"
KERNEL(avx2, WITH_AVX2)
KERNEL(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,popcnt"))))
static int has_avx512(void) {
    return has_avx512f() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

static const struct kernel {
    const char *name;
    int32_t dtype;
    int (*runs_here)(void);
    unit_kernel *attend;
} kernels[] = { /* the fastest first */
#if X86
    {"avx512", BF16, has_avx512, avx512_bf16},
    {"avx512", FP32, has_avx512, avx512_fp32},
    {"avx2", BF16, has_avx2, avx2_bf16},
    {"avx2", FP32, has_avx2, avx2_fp32},
#endif
    {"portable", BF16, always, portable_bf16},
    {"portable", FP32, always, portable_fp32},
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

const char *kernel_name(int32_t k) { return k >= 0 && k < KERNELS ? kernels[k].name : NULL; }

/* Whether kernel k exists, runs on this CPU and takes tensors of dtype. */
int32_t kernel_fits(int32_t k, int32_t dtype) {
    return k >= 0 && k < KERNELS && kernels[k].dtype == dtype && kernels[k].runs_here();
}

struct job {
    const struct attention *a;
    const struct kernel *kernel;
};

static void run_share(void *data) {
    const struct job *j = data;
    int64_t rank = parallel ? team_rank() : 0, size = parallel ? team_size() : 1, units = j->a->k.batch * j->a->k.heads;
    for (int64_t unit = units * rank / size; unit < units * (rank + 1) / size; unit++)
        j->kernel->attend(j->a, unit, j->a->room + rank * j->a->room_step);
}

/* y of `a`, whose room is made here. 0, or -1 if there is no memory. */
int32_t run_attention(const struct attention *given, int32_t k, int32_t threads) {
    struct attention a = *given;
    int64_t rows = a.q.heads / a.k.heads * a.q.tokens, vectors = (a.k.width + LANES - 1) / LANES;
    int64_t stride = (a.k.tokens + KEYS - 1) / KEYS * KEYS;
    int64_t needed = (rows + KEYS) * vectors * LANES + rows * stride + rows;
    a.room_step = (needed + LANES - 1) / LANES * LANES;
    if (!parallel || threads < 1) threads = 1;
    a.room = aligned_alloc(64, (size_t)(threads * a.room_step) * sizeof *a.room);
    if (!a.room) return -1;
    struct job j = {&a, &kernels[k]};
    if (threads > 1) parallel(run_share, &j, (unsigned)threads, 0);
    else
        for (int64_t unit = 0; unit < a.k.batch * a.k.heads; unit++) j.kernel->attend(&a, unit, a.room);
    free(a.room);
    return 0;
}
