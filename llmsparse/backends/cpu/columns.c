/* y = Cut(x) · Wᵀ (+ bias) for a W that lies column by column and a few rows of x, of which most columns are not read.
 *
 * Cut(x) is llmsparse/sparsity/activation.py: which inputs count is found here, to the bit as there, and W is read at these alone.
 * Several rows of x read the union of what counts for each. Columns of a packed W hold a mask word for every GROUP rows and the
 * values that its bits stand for.
 *
 * Rows are shared out by TILE; a thread passes over up to SUMS of them at once, so that what it reads of a column is long, FOUR columns at a
 * time. The sum of a row is made column by column in their order, in float32: the result depends neither on the number of threads
 * nor on how many rows of x there are.
 */
#include <stdlib.h>

#include "floats.h"
#include "share.h"

enum { GROUP = 32, TILE = 512, FOUR = 4, MOST = 4, SUMS = 8192 }; /* SUMS: in fp32 of all rows of x that a pass makes */

struct matrix {
    const char *values;     /* dense (columns, rows); packed: those that are kept, and SLACK bytes behind the last */
    const uint32_t *masks;  /* (columns, groups), NULL if dense */
    const int64_t *starts;  /* packed (columns, tiles): the number of the first value of each tile of rows */
    int64_t rows, columns;
    int32_t dtype;
};

struct rule {
    const float *norms, *centre; /* (columns), or NULL */
    float threshold;
    int64_t keep; /* so many of each row of x and not by the threshold, unless below 0 */
};

/* Columns that are added to the sums of a pass: four of them, and what each is multiplied by for every row of x. */
struct columns {
    const char *values[FOUR], *next[FOUR]; /* of the first row of the pass; those of the four after these */
    const uint32_t *masks[FOUR], *next_masks[FOUR];
    const float *x[FOUR];
};
#define PASS const struct columns *c, int64_t groups, float *sums, int64_t stride
typedef void pass_kernel(PASS); /* sums (M, stride) of groups · GROUP rows */

#define FOR_EACH_M(name, target)                                          \
    target static void name##_1(PASS) { name(c, groups, sums, stride, 1); } \
    target static void name##_2(PASS) { name(c, groups, sums, stride, 2); } \
    target static void name##_3(PASS) { name(c, groups, sums, stride, 3); } \
    target static void name##_4(PASS) { name(c, groups, sums, stride, 4); }
#define EACH_M(name) {name##_1, name##_2, name##_3, name##_4}

INLINE void portable(PASS, int m, int dtype, int packed) {
    const char *p[FOUR];
    for (int i = 0; i < FOUR; i++) p[i] = c->values[i];
    for (int64_t g = 0; g < groups; g++)
        for (int i = 0; i < FOUR; i++) {
            uint32_t mask = packed ? c->masks[i][g] : ~0u;
            float wide[GROUP];
            for (int r = 0; r < GROUP; r++, mask >>= 1) {
                uint32_t kept = mask & 1, bits = 0;
                if (dtype == FP32) memcpy(&bits, p[i], sizeof bits);
                else memcpy((char *)&bits, p[i], BF16), bits = bits << 16;
                bits &= -kept;
                memcpy(&wide[r], &bits, sizeof bits);
                p[i] += dtype * (int)kept;
            }
            for (int j = 0; j < m; j++)
                for (int r = 0; r < GROUP; r++) sums[j * stride + g * GROUP + r] += wide[r] * c->x[i][j];
        }
}
INLINE void portable_bf16(PASS, int m) { portable(c, groups, sums, stride, m, BF16, 0); }
INLINE void portable_fp32(PASS, int m) { portable(c, groups, sums, stride, m, FP32, 0); }
INLINE void portable_packed_bf16(PASS, int m) { portable(c, groups, sums, stride, m, BF16, 1); }
INLINE void portable_packed_fp32(PASS, int m) { portable(c, groups, sums, stride, m, FP32, 1); }
FOR_EACH_M(portable_bf16, )
FOR_EACH_M(portable_fp32, )
FOR_EACH_M(portable_packed_bf16, )
FOR_EACH_M(portable_packed_fp32, )
static int always(void) { return 1; }

typedef void group_kernel(const void *values, uint32_t mask, void *out); /* GROUP of out */
INLINE void portable_group(const void *values, uint32_t mask, void *out, int dtype) {
    for (int r = 0; r < GROUP; r++, mask >>= 1) {
        uint32_t kept = mask & 1;
        if (dtype == BF16) ((uint16_t *)out)[r] = (uint16_t)(*(const uint16_t *)values & -kept);
        else ((uint32_t *)out)[r] = *(const uint32_t *)values & -kept;
        values = (const char *)values + dtype * (int)kept;
    }
}
static void portable_group_bf16(const void *v, uint32_t mask, void *out) { portable_group(v, mask, out, BF16); }
static void portable_group_fp32(const void *v, uint32_t mask, void *out) { portable_group(v, mask, out, FP32); }

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define X86 1
#include "columns_x86.h"
#endif

static const struct kernel {
    const char *name;
    int32_t dtype, packed;
    int32_t pair; /* rows lie in the sums as the even ones of 2 · pair and the odd ones; 0: as they are */
    int (*runs_here)(void);
    pass_kernel *pass[MOST];
} kernels[] = { /* the fastest first */
#if X86
    {"avx512", BF16, 0, 16, has_avx512f, EACH_M(avx512_bf16)},
    {"avx512", FP32, 0, 0, has_avx512f, EACH_M(avx512_fp32)},
    {"avx512-vbmi2", BF16, 1, 16, has_vbmi2, EACH_M(vbmi2_bf16)},
    {"avx512", FP32, 1, 0, has_avx512f, EACH_M(avx512_packed_fp32)},
    {"avx2", BF16, 0, 8, has_avx2, EACH_M(avx2_bf16)},
    {"avx2", FP32, 0, 0, has_avx2, EACH_M(avx2_fp32)},
#endif
    {"portable", BF16, 0, 0, always, EACH_M(portable_bf16)},
    {"portable", FP32, 0, 0, always, EACH_M(portable_fp32)},
    {"portable", BF16, 1, 0, always, EACH_M(portable_packed_bf16)},
    {"portable", FP32, 1, 0, always, EACH_M(portable_packed_fp32)},
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

const char *kernel_name(int32_t k) { return k >= 0 && k < KERNELS ? kernels[k].name : NULL; }

/* Whether kernel k exists, runs on this CPU and takes weights of dtype, packed or not. */
int32_t kernel_fits(int32_t k, int32_t dtype, int32_t packed) {
    return k >= 0 && k < KERNELS && kernels[k].dtype == dtype && kernels[k].packed == packed && kernels[k].runs_here();
}

/* The keep-th largest of scores, which are not negative, so that their bits are in the order of their values. */
static float kth_largest(const float *scores, int64_t count, int64_t keep) {
    uint32_t prefix = 0, bits;
    int64_t left = keep;
    for (int shift = 21; shift >= 0; shift -= shift == 21 ? 11 : 10) { /* bits 31 to 21, 20 to 10, 9 to 0 */
        uint32_t counts[2048] = {0}, width = shift ? 2048 : 1024;
        for (int64_t i = 0; i < count; i++) {
            memcpy(&bits, &scores[i], sizeof bits);
            uint32_t above = shift == 21 ? 0 : shift == 10 ? bits >> 21 : bits >> 10;
            counts[bits >> shift & (width - 1)] += above == prefix;
        }
        uint32_t b = width - 1;
        while (counts[b] < left) left -= counts[b--];
        prefix = shift == 21 ? b : shift == 10 ? prefix << 11 | b : prefix << 10 | b;
    }
    float found;
    memcpy(&found, &prefix, sizeof found);
    return found;
}

struct product {
    const struct kernel *kernel;
    const struct matrix *w;
    const int32_t *counted; /* columns that count, ascending, and what is there again up to a multiple of FOUR */
    const float *x;         /* (count, MOST) what they are multiplied by */
    const void *bias;
    void *y;
    int64_t count;
    int32_t m;
};

static int64_t groups_of(int64_t rows) { return (rows + GROUP - 1) / GROUP; }
static int64_t tiles_of(int64_t rows) { return (rows + TILE - 1) / TILE; }

/* Rows of a pass, from a tile on: all sums of it, or the last of a dense column, which end within a group, from a copy. */
static void add_up(const struct product *p, int64_t row, int64_t rows, float *sums, int64_t stride) {
    const struct matrix *w = p->w;
    int64_t groups = groups_of(rows), tiles = tiles_of(w->rows), whole = rows / GROUP;
    int dtype = w->dtype;
    for (int64_t n = 0; n < p->count; n += FOUR) {
        struct columns c;
        char rest[FOUR][GROUP * FP32];
        for (int i = 0; i < FOUR; i++) {
            int64_t column = p->counted[n + i], after = p->counted[n + FOUR < p->count ? n + FOUR + i : n + i];
            c.x[i] = p->x + (n + i) * MOST;
            if (w->masks) {
                c.masks[i] = w->masks + column * groups_of(w->rows) + row / GROUP;
                c.next_masks[i] = w->masks + after * groups_of(w->rows) + row / GROUP;
                if (n + 3 * FOUR <= p->count) /* else the place of the next would be waited for */
                    __builtin_prefetch(w->starts + p->counted[n + 2 * FOUR + i] * tiles + row / TILE);
                c.values[i] = w->values + w->starts[column * tiles + row / TILE] * dtype;
                c.next[i] = w->values + w->starts[after * tiles + row / TILE] * dtype;
            } else {
                c.masks[i] = c.next_masks[i] = NULL;
                c.values[i] = w->values + (column * w->rows + row) * dtype;
                c.next[i] = w->values + (after * w->rows + row) * dtype;
            }
        }
        if (w->masks) {
            p->kernel->pass[p->m - 1](&c, groups, sums, stride);
            continue;
        }
        if (whole) p->kernel->pass[p->m - 1](&c, whole, sums, stride);
        if (whole == groups) continue;
        for (int i = 0; i < FOUR; i++) {
            memset(rest[i], 0, sizeof rest[i]);
            memcpy(rest[i], c.values[i] + whole * GROUP * dtype, (size_t)((rows - whole * GROUP) * dtype));
            c.values[i] = c.next[i] = rest[i];
        }
        p->kernel->pass[p->m - 1](&c, 1, sums + whole * GROUP, stride);
    }
}

INLINE void write_out(const struct product *p, const float *sums, int64_t row, int64_t taken, int j, int pair, int dtype) {
    for (int64_t r = 0; r < taken; r++) {
        int64_t q = pair ? r & (2 * pair - 1) : 0, at = pair ? r - q + (q & 1) * pair + q / 2 : r;
        put(p->y, j * p->w->rows + row + r, dtype, sums[at] + (p->bias ? get(p->bias, row + r, dtype) : 0));
    }
}

static void multiply(const void *job, int64_t rank, int64_t first, int64_t last) {
    (void)rank;
    const struct product *p = job;
    int64_t rows = p->w->rows, end = last * TILE < rows ? last * TILE : rows, pair = p->kernel->pair;
    int64_t most = SUMS / p->m / TILE * TILE; /* rows of a pass: at least TILE */
    _Alignas(64) float sums[SUMS];
    for (int64_t row = first * TILE, taken; row < end; row += taken) {
        taken = end - row < most ? end - row : most;
        memset(sums, 0, sizeof sums);
        add_up(p, row, taken, sums, most);
        for (int j = 0; j < p->m; j++) {
            if (pair == 16) write_out(p, sums + j * most, row, taken, j, 16, BF16);
            else if (pair) write_out(p, sums + j * most, row, taken, j, 8, BF16);
            else write_out(p, sums + j * most, row, taken, j, 0, p->w->dtype);
        }
    }
}

INLINE void score(const struct matrix *w, const struct rule *r, const void *row, float *restrict scores, float *restrict moved,
                  int dtype) {
    const float *norms = r->norms, *centre = r->centre;
    int64_t columns = w->columns;
    if (centre)
        for (int64_t i = 0; i < columns; i++) {
            float off = get(row, i, dtype) - centre[i];
            moved[i] = dtype == FP32 ? off : widen(narrow(off));
        }
    else
        for (int64_t i = 0; i < columns; i++) moved[i] = get(row, i, dtype);
    if (norms)
        for (int64_t i = 0; i < columns; i++) scores[i] = __builtin_fabsf(moved[i]) * norms[i];
    else
        for (int64_t i = 0; i < columns; i++) scores[i] = __builtin_fabsf(moved[i]);
}

/* Which of the columns count for row j of x: bit j of `who`, and in `moved` what they are multiplied by. */
static void count_in(const struct matrix *w, const struct rule *r, const void *row, int j, float *scores, float *moved,
                     uint8_t *restrict who) {
    if (w->dtype == BF16) score(w, r, row, scores, moved, BF16);
    else score(w, r, row, scores, moved, FP32);
    float least = r->keep > 0 ? kth_largest(scores, w->columns, r->keep) : r->threshold;
    uint8_t bit = (uint8_t)(1 << j);
    int64_t columns = w->columns;
    if (r->keep < 0)
        for (int64_t i = 0; i < columns; i++) who[i] |= scores[i] <= least ? 0 : bit;
    else if (r->keep)
        for (int64_t i = 0; i < columns; i++) who[i] |= scores[i] < least ? 0 : bit;
}

/* y (m, rows) = Cut(x) (m, columns) · Wᵀ + bias (rows) or NULL, all of W's dtype; m at most MOST. How many columns were read, or
 * -1 if there is no memory. */
int64_t columns_product(const struct matrix *w, const struct rule *r, int32_t k, const void *x, int32_t m, const void *bias,
                        void *y, int32_t threads) {
    size_t columns = (size_t)w->columns;
    float *scores = malloc(((1 + (size_t)m) * columns + (columns + FOUR) * MOST) * sizeof *scores);
    int32_t *counted = malloc((columns + FOUR) * sizeof *counted);
    uint8_t *who = calloc(columns + 1, 1);
    int64_t count = 0, read = -1;
    if (scores && counted && who) {
        float *moved = scores + columns, *ready = moved + (size_t)m * columns;
        for (int j = 0; j < m; j++)
            count_in(w, r, (const char *)x + (int64_t)j * w->columns * w->dtype, j, scores, moved + (size_t)j * columns, who);
        for (int64_t i = 0; i < w->columns; i++) counted[count] = (int32_t)i, count += who[i] != 0;
        for (int64_t n = 0; n < count; n++)
            for (int j = 0; j < m; j++)
                ready[n * MOST + j] = who[counted[n]] >> j & 1 ? moved[(size_t)j * columns + (size_t)counted[n]] : 0;
        read = count;
        for (; count % FOUR; count++) {
            counted[count] = counted[read - 1];
            memset(ready + count * MOST, 0, MOST * sizeof *ready);
        }
        struct product p = {&kernels[k], w, counted, ready, bias, y, count, m};
        share_out(multiply, &p, tiles_of(w->rows), threads);
    }
    free(scores), free(counted), free(who);
    return read;
}

struct expansion {
    const struct matrix *w;
    char *out;
    group_kernel *group;
};

/* Tiles of GROUP columns: all of their rows. */
static void expand_some(const void *job, int64_t rank, int64_t first, int64_t last) {
    (void)rank;
    const struct expansion *e = job;
    const struct matrix *w = e->w;
    int64_t groups = groups_of(w->rows), dtype = w->dtype, end = last * GROUP < w->columns ? last * GROUP : w->columns;
    for (int64_t column = first * GROUP; column < end; column++) {
        const char *p = w->values + w->starts[column * tiles_of(w->rows)] * dtype;
        char *to = e->out + column * w->rows * dtype;
        for (int64_t g = 0; g < groups; g++) {
            uint32_t mask = w->masks[column * groups + g];
            char rest[GROUP * FP32];
            int whole = (g + 1) * GROUP <= w->rows;
            e->group(p, mask, whole ? to + g * GROUP * dtype : rest);
            if (!whole) memcpy(to + g * GROUP * dtype, rest, (size_t)((w->rows - g * GROUP) * dtype));
            p += __builtin_popcount(mask) * dtype;
        }
    }
}

/* out (columns, rows) = a packed W, its zeros in their places. */
void columns_expand(const struct matrix *w, void *out, int32_t threads) {
    struct expansion e = {w, out, w->dtype == BF16 ? portable_group_bf16 : portable_group_fp32};
#if X86
    if (has_vbmi2()) e.group = w->dtype == BF16 ? vbmi2_group_bf16 : avx512_group_fp32;
#endif
    share_out(expand_some, &e, (w->columns + GROUP - 1) / GROUP, threads);
}
