/* y = x · Wᵀ (+ bias) for a bitmask-packed W (out, in) and a few rows of x, and W itself unpacked.
 *
 * The neutral format (llmsparse/formats/bitmask.py) is repacked once into tiles of ROWS rows, each cut into groups of
 * COLUMNS columns: for every tile, group and row, in this order, a mask word and the values that its bits stand for.
 * Values and masks are then two streams read strictly forward, and one load of x serves ROWS rows. On Zen 5 this is
 * what lets rows of 11008 keep their gain: row by row, x (22 KB) and the values push each other out of the L1 cache.
 *
 * A tile is always summed by one thread in one order, so the result does not depend on the number of threads.
 * Kernels read up to SLACK elements behind the last value; the tiled buffer is ours and has them. Neutral buffers, which
 * may end where a mapped file does, are only copied from, to the byte.
 *
 * Threads come from the OpenMP runtime that is already in the process (team.h).
 */
#include "tiles.h"

#include "readers.h"

enum { MOST = 4 };     /* rows of x in one pass over a tile */
enum { FEW = 4 };      /* rows of x up to which a tile is unpacked once for each pass, and not for all (many.h) */
enum { AHEAD = 8192 }; /* bytes prefetched ahead: of 0, 1, 2, 4, 8, 12 and 16 KB the best on Zen 5, 1.2 to 1.6 times none */

#define TILE const void *values, const uint32_t *masks, const void *x, int64_t stride, int64_t groups, float *sums
#define FOR_EACH_M(name, target)                                                                          \
    target static void name##_1(TILE) { name(values, masks, x, stride, groups, sums, 1); }                \
    target static void name##_2(TILE) { name(values, masks, x, stride, groups, sums, 2); }                \
    target static void name##_3(TILE) { name(values, masks, x, stride, groups, sums, 3); }                \
    target static void name##_4(TILE) { name(values, masks, x, stride, groups, sums, 4); }
#define EACH_M(name) {name##_1, name##_2, name##_3, name##_4}

typedef void tile_kernel(TILE); /* sums (M, ROWS) of values, masks of the tile, x (M, stride), zero behind the last column */
typedef int64_t group_kernel(const void *values, uint32_t mask, void *out); /* COLUMNS of out; how many values it took */

/* No branch on a bit: with random masks it would be mispredicted. */
INLINE int64_t portable_group(const void *values, uint32_t mask, void *out, int dtype) {
    int64_t taken = 0;
    for (int c = 0; c < COLUMNS; c++, mask >>= 1) {
        uint32_t kept = mask & 1;
        if (dtype == BF16) ((uint16_t *)out)[c] = (uint16_t)(((const uint16_t *)values)[taken] & -kept);
        else ((uint32_t *)out)[c] = ((const uint32_t *)values)[taken] & -kept;
        taken += kept;
    }
    return taken;
}
static int64_t portable_group_bf16(const void *v, uint32_t mask, void *out) { return portable_group(v, mask, out, BF16); }
static int64_t portable_group_fp32(const void *v, uint32_t mask, void *out) { return portable_group(v, mask, out, FP32); }

/* Zeros are multiplied too, as everywhere: 0 · Inf must be NaN here if it is in the dense product. */
INLINE void portable(TILE, int m, int dtype) {
    typedef float lanes __attribute__((vector_size(16))); /* SSE2, NEON */
    lanes sum[MOST][ROWS] = {{{0}}}, wide[COLUMNS / 4];
    const char *p = values;
    for (int64_t g = 0; g < groups; g++)
        for (int i = 0; i < ROWS; i++) {
            uint32_t mask = masks[g * ROWS + i];
            for (int c = 0; c < COLUMNS; c += 4) {
                uint32_t bits[4];
                for (int l = 0; l < 4; l++, mask >>= 1) {
                    int kept = mask & 1;
                    bits[l] = (dtype == BF16 ? (uint32_t)*(const uint16_t *)p << 16 : *(const uint32_t *)p) & -(uint32_t)kept;
                    p += dtype * kept;
                }
                memcpy(&wide[c / 4], bits, sizeof bits);
            }
            for (int j = 0; j < m; j++)
                for (int l = 0; l < COLUMNS / 4; l++) {
                    lanes xs;
                    memcpy(&xs, (const float *)x + j * stride + g * COLUMNS + l * 4, sizeof xs);
                    sum[j][i] += wide[l] * xs;
                }
        }
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sums[j * ROWS + i] = sum[j][i][0] + sum[j][i][1] + (sum[j][i][2] + sum[j][i][3]);
}
INLINE void portable_bf16(TILE, int m) { portable(values, masks, x, stride, groups, sums, m, BF16); }
INLINE void portable_fp32(TILE, int m) { portable(values, masks, x, stride, groups, sums, m, FP32); }
FOR_EACH_M(portable_bf16, )
FOR_EACH_M(portable_fp32, )
static int always(void) { return 1; }

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define X86 1
#include "x86.h"
#endif
#include "many.h"

static const struct kernel {
    const char *name;
    int32_t dtype, x_dtype; /* of W, and of the x it reads: bf16 x is widened for one that reads fp32 */
    int (*runs_here)(void);
    tile_kernel *tile[MOST];
    group_kernel *group;
    unpack_kernel *unpack; /* for many tokens, or NULL */
} kernels[] = { /* the fastest first */
#if X86
    {"avx512-bf16", BF16, BF16, has_bf16, EACH_M(avx512_bf16), avx512_group_bf16, unpack_avx512},
    {"avx512-vbmi2", BF16, FP32, has_vbmi2, EACH_M(avx512_vbmi2), avx512_group_bf16, NULL},
    {"avx512-fp32", FP32, FP32, has_avx512f, EACH_M(avx512_fp32), avx512_group_fp32, NULL},
    {"avx2", BF16, FP32, has_avx2, EACH_M(avx2_bf16), avx2_group_bf16, NULL},
    {"avx2", FP32, FP32, has_avx2, EACH_M(avx2_fp32), avx2_group_fp32, NULL},
#endif
    {"portable", BF16, FP32, always, EACH_M(portable_bf16), portable_group_bf16, NULL},
    {"portable", FP32, FP32, always, EACH_M(portable_fp32), portable_group_fp32, NULL},
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

const char *kernel_name(int32_t k) { return k >= 0 && k < KERNELS ? kernels[k].name : NULL; }

/* Whether kernel k exists, runs on this CPU and takes a W of dtype with an x of x_dtype, without rounding either. */
int32_t kernel_fits(int32_t k, int32_t dtype, int32_t x_dtype) {
    return k >= 0 && k < KERNELS && kernels[k].dtype == dtype && kernels[k].x_dtype >= x_dtype && kernels[k].runs_here();
}

/* What a weight adds to the bias, and where the sums go. */
struct target {
    const void *bias; /* (rows,) or NULL */
    void *y;          /* (m, rows) */
    int32_t bias_dtype;
};

struct product {
    const struct weight *const *w;
    const struct target *targets; /* one for each weight */
    const struct kernel *kernel;
    const void *x;
    int64_t stride;
    int32_t m, y_dtype;
    char *room; /* of each thread, for many tokens; NULL for few */
};

/* Add the bias and round, for m rows of x from `from` on. */
static void finish(const struct product *p, int64_t which, int64_t tile, int32_t from, int32_t m, const float *sums) {
    const struct target *t = &p->targets[which];
    for (int64_t i = 0; i < rows_of(p->w[which], tile); i++) {
        int64_t row = tile * ROWS + i;
        float bias = t->bias ? get(t->bias, row, t->bias_dtype) : 0;
        for (int64_t j = 0; j < m; j++) put(t->y, (from + j) * p->w[which]->rows + row, p->y_dtype, sums[j * ROWS + i] + bias);
    }
}

#if X86
/* The same in bf16, of several tiles. */
WITH_AVX512F static void finish_many(const void *job, int64_t which, int64_t tile, int64_t tiles, int32_t from, int32_t m,
                                     const float *sums) {
    const struct product *p = job;
    const struct target *t = &p->targets[which];
    int64_t rows = p->w[which]->rows, row = tile * ROWS, count = rows - row < tiles * ROWS ? rows - row : tiles * ROWS;
    uint16_t *y = (uint16_t *)t->y + from * rows + row;
    float bias[TILES * ROWS] = {0};
    for (int64_t i = 0; t->bias && i < count; i++) bias[i] = get(t->bias, row + i, t->bias_dtype);
    for (int64_t j = 0; j < m; j++, y += rows, sums += TILES * ROWS) {
        if (count == 16) _mm256_storeu_si256((__m256i *)y, narrow_16(_mm512_add_ps(_mm512_loadu_ps(sums), _mm512_loadu_ps(bias))));
        else
            for (int64_t i = 0; i < count; i++) put(y, i, BF16, sums[i] + bias[i]);
    }
}
#endif

static void multiply(const void *job, int64_t rank, int64_t which, int64_t first, int64_t last) {
    const struct product *p = job;
    (void)rank;
    const struct weight *w = p->w[which];
    int64_t groups = groups_of(w);
#if X86
    if (p->room) {
        struct many all = {p->kernel->unpack, finish_many, p, p->x, p->stride, p->m};
        return multiply_many(&all, w, which, first, last, p->room + rank * room_for_many(p->stride, p->m));
    }
#endif
    for (int64_t tile = first; tile < last; tile++) {
        const char *values = (const char *)w->values + w->starts[tile] * w->dtype;
        for (int32_t done = 0; done < p->m; done += MOST) { /* later passes find the tile in the cache */
            float sums[MOST * ROWS];
            int32_t m = p->m - done < MOST ? p->m - done : MOST;
            const char *x = (const char *)p->x + done * p->stride * p->kernel->x_dtype;
            p->kernel->tile[m - 1](values, w->masks + tile * groups * ROWS, x, p->stride, groups, sums);
            finish(p, which, tile, done, m, sums);
        }
    }
}

/* x (m, columns) in the kernel's dtype, each row filled up with zeros to whole groups: x itself if it is so already. */
static void *prepared(const struct product *p, const void *x, int32_t x_dtype) {
    int64_t columns = p->w[0]->columns;
    if (columns == p->stride && x_dtype == p->kernel->x_dtype) return (void *)x;
    char *copy = calloc((size_t)(p->m * p->stride) + 1, (size_t)p->kernel->x_dtype);
    for (int j = 0; copy && j < p->m; j++) {
        const char *row = (const char *)x + j * columns * x_dtype;
        char *to = copy + j * p->stride * p->kernel->x_dtype;
        if (x_dtype == p->kernel->x_dtype) memcpy(to, row, (size_t)(columns * x_dtype));
        else
            for (int64_t c = 0; c < columns; c++) put(to, c, p->kernel->x_dtype, get(row, c, x_dtype));
    }
    return copy;
}

/* y (m, rows) of x_dtype = x (m, columns) · Wᵀ + bias for each of `count` weights of the same columns and dtype, in one go.
 * 0, or -1 if there is no memory. */
int32_t matvec(const struct weight *const *w, const struct target *targets, int64_t count, int32_t k, const void *x,
               int32_t x_dtype, int32_t m, int32_t threads) {
    struct product p = {w, targets, &kernels[k], NULL, groups_of(w[0]) * COLUMNS, m, x_dtype, NULL};
    int many = m > FEW && p.kernel->unpack;
    void *ready = prepared(&p, x, x_dtype);
    if (many) p.room = aligned_alloc(LANES, (size_t)(room_for_many(p.stride, m) * (threads > 1 ? threads : 1)));
    if (ready && (p.room || !many)) {
        p.x = ready;
        share_out(w, count, multiply, &p, threads);
    }
    free(p.room);
    if (ready != x) free(ready);
    return p.x ? 0 : -1;
}

struct unpacking {
    const struct weight *w;
    const struct kernel *kernel;
    char *out;
};

static void unpack(const void *job, int64_t rank, int64_t which, int64_t first, int64_t last) {
    const struct unpacking *u = job;
    (void)rank, (void)which;
    const struct weight *w = u->w;
    int64_t groups = groups_of(w), whole = w->columns / COLUMNS;
    for (int64_t tile = first; tile < last; tile++) {
        const char *values = (const char *)w->values + w->starts[tile] * w->dtype;
        const uint32_t *masks = w->masks + tile * groups * ROWS;
        int64_t rows = rows_of(w, tile);
        for (int64_t g = 0; g < groups; g++)
            for (int64_t i = 0; i < rows; i++) {
                char group[COLUMNS * FP32] __attribute__((aligned(64)));
                char *to = u->out + ((tile * ROWS + i) * w->columns + g * COLUMNS) * w->dtype;
                values += w->dtype * u->kernel->group(values, masks[g * ROWS + i], g < whole ? to : group);
                if (g == whole) memcpy(to, group, (size_t)(w->columns % COLUMNS * w->dtype));
            }
    }
#if X86
    _mm_sfence(); /* what was streamed is seen by whoever is told that this is done */
#endif
}

/* W into out (rows, columns), of its own dtype. */
void expand(const struct weight *w, int32_t k, void *out, int32_t threads) {
    struct unpacking u = {w, &kernels[k], out};
    share_out(&w, 1, unpack, &u, threads);
}
