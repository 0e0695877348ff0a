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

#include "rows.h"

struct experts {
    const char *gate, *up, *down;     /* of expert 0: gate and up (inner, width), down (width, inner) */
    int64_t inner_step, outer_step;   /* bytes to the next expert's gate and up, and to its down */
    int64_t count, width, inner;
    int32_t dtype;
};

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

/* Tiles `first` to `last` of the neurons of all groups: h. */
static void enter(const void *job, int64_t rank, int64_t first, int64_t last) {
    (void)rank;
    const struct mixture *v = job;
    const struct experts *e = v->e;
    int64_t tiles = tiles_of(e->inner);
    for (int64_t at = first; at < last; at++) {
        const struct group *group = &v->groups[at / tiles];
        int64_t row = at % tiles * ROWS;
        const char *gate[ROWS], *up[ROWS];
        rows_of(e->gate + group->expert * e->inner_step, row, e->inner, e->width * e->dtype, gate);
        rows_of(e->up + group->expert * e->inner_step, row, e->inner, e->width * e->dtype, up);
        for (int32_t from = group->first, m; from < group->end; from += m) { /* later passes find the rows in the cache */
            m = in_a_pass(v->kernel, e->width, group->end - from);
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
                    put(h, row + i, v->kernel->x_dtype, value);
                }
        }
    }
}

/* Tiles `first` to `last` of the rows of D: y. */
static void leave(const void *job, int64_t rank, int64_t first, int64_t last) {
    (void)rank;
    const struct mixture *v = job;
    const struct experts *e = v->e;
    int64_t end = last * ROWS < e->width ? last * ROWS : e->width;
    for (int32_t g = 0; g < v->group_count; g++)
        for (int64_t row = first * ROWS; row < end; row += ROWS) {
            const struct group *group = &v->groups[g];
            const char *down[ROWS];
            rows_of(e->down + group->expert * e->outer_step, row, e->width, e->inner * e->dtype, down);
            for (int32_t from = group->first, m; from < group->end; from += m) {
                m = in_a_pass(v->kernel, e->inner, group->end - from);
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
        for (int64_t row = first * ROWS; row < end; row++) put(v->y, at * e->width + row, e->dtype, v->sums[at * e->width + row]);
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
    v.x = as_read(v.kernel, x, tokens, e->width, parts[0]), v.h = parts[1], v.sums = parts[2], v.pairs = parts[3], v.groups = parts[4];
    sort(&v, index, shares, choices, parts[5]);
    share_out(enter, &v, v.group_count * tiles_of(e->inner), threads);
    share_out(leave, &v, tiles_of(e->width), threads);
    free(memory);
    return 0;
}
