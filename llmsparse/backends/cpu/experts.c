/* y_t = Σ_k share_tk · D_e (silu(G_e x_t) ∘ U_e x_t) with e = index_tk: the experts that a few tokens chose, read in place.
 *
 * Pairs of a token and an expert are sorted by expert, so that the rows of an expert are read once however many tokens
 * chose it, and those of the others not at all. Two passes, each shared out to threads by rows: all of G and U, then
 * all of D. Rows are taken ROWS at a time, which stay in the cache while MOST tokens after MOST tokens pass over them.
 *
 * A sum is always made by one thread in one order, that of columns and then of experts, in float32: the result does not
 * depend on the number of threads. The share is multiplied in before D, and where the kernel reads bf16 the inner values
 * are rounded to it once; y is rounded once.
 */
#include <math.h>
#include <stdlib.h>

#include "floats.h"
#include "team.h"

enum { ROWS = 4, COLUMNS = 32, CHAINS = 4 };
enum { MOST = 4 };     /* tokens in one pass over a tile */
enum { AHEAD = 4096 }; /* bytes prefetched ahead: of 0, 2, 4 and 8 KB the best on Zen 5, 1.2 to 1.4 times none */

struct experts {
    const char *gate, *up, *down;     /* of expert 0: gate and up (inner, width), down (width, inner) */
    int64_t inner_step, outer_step;   /* bytes to the next expert's gate and up, and to its down */
    int64_t count, width, inner;
    int32_t dtype;
};

#define TILE const char *const *w, const char *const *x, int64_t columns, float *sums
#define FOR_EACH_M(name, target)                                          \
    target static void name##_1(TILE) { name(w, x, columns, sums, 1); }   \
    target static void name##_2(TILE) { name(w, x, columns, sums, 2); }   \
    target static void name##_3(TILE) { name(w, x, columns, sums, 3); }   \
    target static void name##_4(TILE) { name(w, x, columns, sums, 4); }
#define EACH_M(name) {name##_1, name##_2, name##_3, name##_4}

typedef void tile_kernel(TILE); /* sums (M, ROWS) of ROWS rows of a weight and M of x, which are zero behind the last column */

/* A kernel from what it does with COLUMNS weights at `p` and with x from column c on. Row by row, in CHAINS sums: four rows
 * at a time would load x less often, and read from memory at two thirds of the speed (Zen 5, rows of 1024). Behind the last
 * whole group a row ends: what is left of it is copied, and nothing behind it is read. */
#define TILE_KERNEL(name, target, VECTOR, ZERO, BYTES, SUM, ...)                                     \
    target INLINE void name(TILE, int m) {                                                           \
        for (int i = 0; i < ROWS; i++) {                                                             \
            VECTOR sum[MOST][CHAINS];                                                                \
            int64_t at = 0;                                                                          \
            for (int j = 0; j < m; j++)                                                              \
                for (int u = 0; u < CHAINS; u++) sum[j][u] = ZERO;                                   \
            for (; at + CHAINS * COLUMNS <= columns; at += CHAINS * COLUMNS)                         \
                UNROLL for (int u = 0; u < CHAINS; u++) {                                            \
                    int64_t c = at + u * COLUMNS;                                                    \
                    const char *p = w[i] + c * (BYTES);                                              \
                    __VA_ARGS__                                                                      \
                }                                                                                    \
            for (int64_t c = at; c < columns; c += COLUMNS) {                                        \
                enum { u = 0 };                                                                      \
                char rest[COLUMNS * (BYTES)];                                                        \
                const char *p = w[i] + c * (BYTES);                                                  \
                if (columns - c < COLUMNS) {                                                         \
                    memset(rest, 0, sizeof rest);                                                    \
                    p = memcpy(rest, p, (size_t)((columns - c) * (BYTES)));                          \
                }                                                                                    \
                __VA_ARGS__                                                                          \
            }                                                                                        \
            for (int j = 0; j < m; j++)                                                              \
                sums[j * ROWS + i] = SUM(sum[j][0] + sum[j][1] + (sum[j][2] + sum[j][3]));           \
        }                                                                                            \
    }                                                                                                \
    FOR_EACH_M(name, target)

typedef float lanes __attribute__((vector_size(16))); /* SSE2, NEON */
INLINE float sum_of_lanes(lanes v) { return v[0] + v[1] + (v[2] + v[3]); }

TILE_KERNEL(portable_bf16, , lanes, (lanes){0}, BF16, sum_of_lanes, {
    for (int l = 0; l < COLUMNS; l += 4) {
        uint16_t half[4];
        uint32_t bits[4];
        lanes wide, xs;
        memcpy(half, p + l * BF16, sizeof half);
        for (int b = 0; b < 4; b++) bits[b] = (uint32_t)half[b] << 16;
        memcpy(&wide, bits, sizeof wide);
        for (int j = 0; j < m; j++) memcpy(&xs, x[j] + (c + l) * FP32, sizeof xs), sum[j][u] += wide * xs;
    }
})
TILE_KERNEL(portable_fp32, , lanes, (lanes){0}, FP32, sum_of_lanes, {
    for (int l = 0; l < COLUMNS; l += 4) {
        lanes wide, xs;
        memcpy(&wide, p + l * FP32, sizeof wide);
        for (int j = 0; j < m; j++) memcpy(&xs, x[j] + (c + l) * FP32, sizeof xs), sum[j][u] += wide * xs;
    }
})
static int always(void) { return 1; }

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define X86 1
#include "experts_x86.h"
#endif

static const struct kernel {
    const char *name;
    int32_t dtype, x_dtype; /* of the weights, and of the x that it reads: bf16 is widened for one that reads fp32 */
    int (*runs_here)(void);
    tile_kernel *tile[MOST];
} kernels[] = { /* the fastest first */
#if X86
    {"avx512-bf16", BF16, BF16, has_bf16, EACH_M(avx512_dot)},
    {"avx512", BF16, FP32, has_avx512f, EACH_M(avx512_bf16)},
    {"avx512", FP32, FP32, has_avx512f, EACH_M(avx512_fp32)},
    {"avx2", BF16, FP32, has_avx2, EACH_M(avx2_bf16)},
    {"avx2", FP32, FP32, has_avx2, EACH_M(avx2_fp32)},
#endif
    {"portable", BF16, FP32, always, EACH_M(portable_bf16)},
    {"portable", FP32, FP32, always, EACH_M(portable_fp32)},
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

const char *kernel_name(int32_t k) { return k >= 0 && k < KERNELS ? kernels[k].name : NULL; }

/* Whether kernel k exists, runs on this CPU and takes weights of dtype. */
int32_t kernel_fits(int32_t k, int32_t dtype) {
    return k >= 0 && k < KERNELS && kernels[k].dtype == dtype && kernels[k].runs_here();
}

/* g / (1 + e^-g), in double so that only the last rounding shows: e^x = 2^n e^r with x = n ln 2 + r, |r| ≤ ½ ln 2. */
INLINE float silu(float g) {
    double x = -(double)g, clamped = x > 700 ? 700 : x < -700 ? -700 : x; /* NaN is neither */
    double shifted = clamped * 1.4426950408889634 + 6755399441055744.0;   /* the integer n in the low bits */
    double r = clamped - (shifted - 6755399441055744.0) * 0.6931471805599453;
    double power = 1 + r * (1 + r * (1.0 / 2 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * (1.0 / 720 + r * (1.0 / 5040 + r / 40320)))))));
    uint64_t bits;
    double scale;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;
    memcpy(&scale, &bits, sizeof scale);
    return (float)(g / (1 + (x > 700 ? (double)INFINITY : power * scale)));
}

struct pair {
    int32_t token;
    float share;
};
struct group { /* pairs of one expert, next to each other */
    int64_t expert;
    int32_t first, end;
};
struct mixture {
    const struct experts *e;
    const struct kernel *kernel;
    const char *x;     /* (tokens, x_stride) as the kernel reads it */
    char *h;           /* (pairs, h_stride) likewise: share · silu(G x) ∘ U x */
    float *sums;       /* (tokens, width) */
    void *y;           /* (tokens, width) of the weights' dtype */
    struct pair *pairs;
    struct group *groups;
    int64_t x_stride, h_stride; /* bytes */
    int32_t tokens, group_count;
};

static int64_t tiles_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }
static int64_t padded(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS; }
static int32_t at_most(int32_t number) { return number < MOST ? number : MOST; }

/* The rows of a tile; the last row again in place of those that are not there. */
static void rows_of(const char *weight, int64_t row, int64_t rows, int64_t row_bytes, const char **w) {
    for (int64_t i = 0; i < ROWS; i++) w[i] = weight + (row + i < rows ? row + i : rows - 1) * row_bytes;
}

/* Tiles `first` to `last` of the neurons of all groups: h. */
static void enter(const void *job, int64_t first, int64_t last) {
    const struct mixture *v = job;
    const struct experts *e = v->e;
    int64_t tiles = tiles_of(e->inner);
    for (int64_t at = first; at < last; at++) {
        const struct group *group = &v->groups[at / tiles];
        int64_t row = at % tiles * ROWS;
        const char *gate[ROWS], *up[ROWS];
        rows_of(e->gate + group->expert * e->inner_step, row, e->inner, e->width * e->dtype, gate);
        rows_of(e->up + group->expert * e->inner_step, row, e->inner, e->width * e->dtype, up);
        for (int32_t from = group->first; from < group->end; from += MOST) { /* later passes find the rows in the cache */
            int32_t m = at_most(group->end - from);
            const char *x[MOST];
            float gates[MOST * ROWS], ups[MOST * ROWS];
            for (int j = 0; j < m; j++) x[j] = v->x + v->pairs[from + j].token * v->x_stride;
            v->kernel->tile[m - 1](gate, x, e->width, gates);
            v->kernel->tile[m - 1](up, x, e->width, ups);
            for (int l = 0; l < m * ROWS; l++) gates[l] = silu(gates[l]) * ups[l];
            for (int j = 0; j < m; j++)
                for (int64_t i = 0; i < ROWS && row + i < e->inner; i++) {
                    float value = gates[j * ROWS + i] * v->pairs[from + j].share;
                    char *h = v->h + (from + j) * v->h_stride;
                    if (v->kernel->x_dtype == FP32) ((float *)h)[row + i] = value;
                    else ((uint16_t *)h)[row + i] = narrow(value);
                }
        }
    }
}

/* Tiles `first` to `last` of the rows of D: y. */
static void leave(const void *job, int64_t first, int64_t last) {
    const struct mixture *v = job;
    const struct experts *e = v->e;
    int64_t end = last * ROWS < e->width ? last * ROWS : e->width;
    for (int32_t g = 0; g < v->group_count; g++)
        for (int64_t row = first * ROWS; row < end; row += ROWS) {
            const struct group *group = &v->groups[g];
            const char *down[ROWS];
            rows_of(e->down + group->expert * e->outer_step, row, e->width, e->inner * e->dtype, down);
            for (int32_t from = group->first; from < group->end; from += MOST) {
                int32_t m = at_most(group->end - from);
                const char *h[MOST];
                float part[MOST * ROWS];
                for (int j = 0; j < m; j++) h[j] = v->h + (from + j) * v->h_stride;
                v->kernel->tile[m - 1](down, h, e->inner, part);
                for (int j = 0; j < m; j++)
                    for (int64_t i = 0; i < ROWS && row + i < end; i++)
                        v->sums[v->pairs[from + j].token * e->width + row + i] += part[j * ROWS + i];
            }
        }
    for (int64_t at = 0; at < v->tokens; at++)
        for (int64_t row = first * ROWS; row < end; row++) {
            float sum = v->sums[at * e->width + row];
            if (e->dtype == FP32) ((float *)v->y)[at * e->width + row] = sum;
            else ((uint16_t *)v->y)[at * e->width + row] = narrow(sum);
        }
}

struct share {
    void (*run)(const void *job, int64_t first, int64_t last);
    const void *job;
    int64_t tiles;
};
static void run_share(void *data) {
    const struct share *s = data;
    int64_t rank = team_rank(), size = team_size();
    s->run(s->job, s->tiles * rank / size, s->tiles * (rank + 1) / size);
}
static void share_out(void (*run)(const void *, int64_t, int64_t), const void *job, int64_t tiles, int32_t threads) {
    struct share s = {run, job, tiles};
    if (threads > 1 && parallel && tiles > 1) parallel(run_share, &s, (unsigned)threads, 0);
    else run(job, 0, tiles);
}

/* Sort the pairs by expert; those with an index that is no expert's are left out. `counts` (count + 1,) is zero. */
static void sort(struct mixture *v, const int64_t *index, const float *shares, int32_t choices, int32_t *counts) {
    int64_t count = v->e->count, all = (int64_t)v->tokens * choices;
    for (int64_t p = 0; p < all; p++)
        if (index[p] >= 0 && index[p] < count) counts[index[p] + 1]++;
    for (int64_t e = 0; e < count; e++) {
        int32_t first = counts[e], end = first + counts[e + 1];
        if (end > first) v->groups[v->group_count++] = (struct group){e, first, end};
        counts[e + 1] = end;
    }
    for (int64_t p = 0; p < all; p++)
        if (index[p] >= 0 && index[p] < count)
            v->pairs[counts[index[p]]++] = (struct pair){(int32_t)(p / choices), shares[p]};
}

/* x (tokens, width) in the kernel's dtype, each row filled up with zeros to whole groups: x itself if it is so already. */
static const char *prepared(const struct mixture *v, const char *x, char *copy) {
    int64_t width = v->e->width, row_bytes = width * v->e->dtype;
    if (row_bytes == v->x_stride) return x;
    for (int64_t t = 0; t < v->tokens; t++) {
        const char *row = x + t * row_bytes;
        char *to = copy + t * v->x_stride;
        if (v->kernel->x_dtype == v->e->dtype) memcpy(to, row, (size_t)row_bytes);
        else
            for (int64_t c = 0; c < width; c++) ((float *)to)[c] = widen(((const uint16_t *)row)[c]);
    }
    return copy;
}

/* y (tokens, width) from x (tokens, width), both of the weights' dtype, index (tokens, choices) and shares (tokens, choices).
 * 0, or -1 if there is no memory. */
int32_t run_experts(const struct experts *e, int32_t k, const void *x, int32_t tokens, const int64_t *index,
                    const float *shares, int32_t choices, void *y, int32_t threads) {
    int64_t all = (int64_t)tokens * choices, most = all < e->count ? all : e->count;
    struct mixture v = {.e = e, .kernel = &kernels[k], .y = y, .tokens = tokens};
    v.x_stride = padded(e->width) * v.kernel->x_dtype, v.h_stride = padded(e->inner) * v.kernel->x_dtype;
    size_t sizes[] = {
        (size_t)(tokens * v.x_stride), (size_t)(all * v.h_stride), (size_t)(tokens * e->width) * sizeof *v.sums,
        (size_t)all * sizeof *v.pairs, (size_t)most * sizeof *v.groups, (size_t)(e->count + 1) * sizeof(int32_t),
    };
    void *parts[sizeof sizes / sizeof *sizes];
    size_t total = 64;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) total += (sizes[s] + 63) / 64 * 64;
    char *memory = calloc(total, 1), *next = memory;
    if (!memory) return -1;
    next += -(uintptr_t)next % 64;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) parts[s] = next, next += (sizes[s] + 63) / 64 * 64;
    v.x = prepared(&v, x, parts[0]), v.h = parts[1], v.sums = parts[2], v.pairs = parts[3], v.groups = parts[4];
    sort(&v, index, shares, choices, parts[5]);
    share_out(enter, &v, v.group_count * tiles_of(e->inner), threads);
    share_out(leave, &v, tiles_of(e->width), threads);
    free(memory);
    return 0;
}
