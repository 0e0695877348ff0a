/* y = x · Wᵀ (+ bias) for W = steps · q and a few rows of x, and W itself unpacked; exact: W is what the format says, rounded as it
 * is there, and products are summed in float32; or with x in 8 bits (nested_int8.h). nested.h says how it lies in memory.
 *
 * A tile is always summed by one thread in one order, so the result does not depend on the number of threads.
 */
#include "nested.h"

enum { MOST = 4 };     /* rows of x in one pass over a tile */
enum { FEW = 4 };      /* rows of x up to which a tile is unpacked once for each pass, and not for all (many.h) */
enum { AHEAD = 4096 }; /* bytes prefetched ahead */

#define TILE const struct nested *w, int64_t tile, const void *x, int64_t stride, float *sums
#define FOR_EACH_M(name, target)                                             \
    target static void name##_1(TILE) { name(w, tile, x, stride, sums, 1); } \
    target static void name##_2(TILE) { name(w, tile, x, stride, sums, 2); } \
    target static void name##_3(TILE) { name(w, tile, x, stride, sums, 3); } \
    target static void name##_4(TILE) { name(w, tile, x, stride, sums, 4); }
#define EACH_M(name) {name##_1, name##_2, name##_3, name##_4}

/* The numbers of a row of a run → q (RUN,); the escapes behind it. */
typedef const uint8_t *row_kernel(const struct nested *w, int64_t tile, int64_t run, int row, const uint8_t *escapes, int8_t *q);
/* The same multiplied with its step, RUN of w's dtype. */
typedef const uint8_t *weight_kernel(const struct nested *w, int64_t tile, int64_t run, int row, const uint8_t *escapes, float step,
                                     char *to);
typedef void tile_kernel(TILE); /* sums (M, ROWS) without what is listed, of x (M, stride) as laid out for it */
typedef void lay_kernel(const struct nested *w, const void *x, char *to); /* x (columns,) of w's dtype → (stride,) */

/* A weight: the product is exact in float32, and rounded once. */
INLINE float weight_of(float step, int q, int stored) {
    float v = step * (float)q;
    return stored == BF16 ? widen(narrow(v)) : v;
}
INLINE float step_of(const struct nested *w, int64_t row, int64_t column) {
    int64_t groups = (w->columns + w->group - 1) / w->group;
    return widen(w->steps[(row < w->rows ? row : w->rows - 1) * groups + column / w->group]);
}

/* Escapes of a row where there is more, and what is behind them: two rows share theirs. */
INLINE const uint8_t *over(const struct nested *w, int64_t tile, int64_t run, int row, uint64_t more, const uint8_t *escapes, int8_t *q) {
    for (const uint8_t *e = escapes; more; more &= more - 1, e++) q[__builtin_ctzll(more)] = (int8_t)((*e >> row % 2 * 4 & 15) - OFFSET);
    int done = row % 2 || row == rows_in(w, tile) - 1;
    return done ? escapes + w->counts[(tile * runs_of(w) + run) * ROWS / 2 + row / 2] : escapes;
}

/* The numbers of a row of a run, and what they took of the escapes. */
INLINE const uint8_t *numbers(const struct nested *w, int64_t tile, int64_t run, int row, const uint8_t *escapes, int8_t *q) {
    static const int8_t small[4] = {0, 1, -1, 0};
    if (w->wide) {
        uint64_t mask = ((const uint64_t *)w->pairs)[(tile * runs_of(w) + run) * ROWS + row];
        for (int c = 0; c < RUN; c++, mask >>= 1) q[c] = (int8_t)(*escapes & -(mask & 1)), escapes += mask & 1;
        return escapes;
    }
    const uint8_t *pairs = w->pairs + (tile * runs_of(w) + run) * RUN;
    uint64_t more = 0;
    for (int c = 0; c < RUN; c++) {
        unsigned pair = pairs[c] >> 2 * row & 3;
        q[c] = small[pair], more |= (uint64_t)(pair == 3) << c;
    }
    return over(w, tile, run, row, more, escapes, q);
}

/* Any vector of floats will do: the same lines are compiled for AVX2. Zeros are multiplied too, as everywhere: 0 · Inf must be NaN
 * here if it is in the dense product. */
#define PLAIN_TILE(name, target, LANES, numbers)                                                              \
    target INLINE void name(TILE, int m) {                                                                    \
        typedef float lanes __attribute__((vector_size(4 * LANES)));                                          \
        lanes sum[MOST][ROWS] = {{{0}}};                                                                      \
        const uint8_t *escapes = w->escapes + w->starts[tile];                                                \
        int64_t rows = rows_in(w, tile);                                                                      \
        for (int64_t r = 0; r < runs_of(w); r++)                                                              \
            for (int i = 0; i < rows; i++) {                                                                  \
                int8_t q[RUN];                                                                                \
                float v[RUN], step = step_of(w, tile * ROWS + i, r * RUN);                                    \
                escapes = numbers(w, tile, r, i, escapes, q);                                                 \
                for (int c = 0; c < RUN; c++) v[c] = weight_of(step, q[c], w->stored);                        \
                for (int j = 0; j < m; j++)                                                                   \
                    for (int c = 0; c < RUN; c += LANES) {                                                    \
                        lanes a, b;                                                                           \
                        memcpy(&a, v + c, sizeof a);                                                          \
                        memcpy(&b, (const float *)x + j * stride + r * RUN + c, sizeof b);                    \
                        sum[j][i] += a * b;                                                                   \
                    }                                                                                         \
            }                                                                                                 \
        for (int j = 0; j < m; j++)                                                                           \
            for (int i = 0; i < ROWS; i++) {                                                                  \
                float all = 0;                                                                                \
                for (int l = 0; l < LANES; l++) all += sum[j][i][l];                                          \
                sums[j * ROWS + i] = all;                                                                     \
            }                                                                                                 \
    }                                                                                                         \
    FOR_EACH_M(name, target)

PLAIN_TILE(portable, , 4, numbers)
static const uint8_t *numbers_portable(const struct nested *w, int64_t tile, int64_t run, int row, const uint8_t *escapes, int8_t *q) {
    return numbers(w, tile, run, row, escapes, q);
}
static int always(void) { return 1; }

/* A row of x as the kernels in float32 read it: zeros behind the last column. */
static void lay_plain(const struct nested *w, const void *x, char *to) {
    for (int64_t c = 0; c < runs_of(w) * RUN; c++) ((float *)to)[c] = c < w->columns ? get(x, c, w->dtype) : 0;
}

#include "nested_int8.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define X86 1
#include "nested_x86.h"

#include "nested_int8_x86.h"
#endif
#include "many.h"

static const struct kernel {
    const char *name;
    int32_t dtype; /* of the x that it reads: bf16 is widened for one that reads fp32; INT8: records */
    int32_t wide;  /* whether it takes wide weights, too */
    int (*runs_here)(void);
    tile_kernel *tile[MOST];
    row_kernel *row;
    lay_kernel *lay;
    weight_kernel *weights; /* or NULL */
    unpack_kernel *unpack;  /* for many tokens, or NULL */
} kernels[] = { /* the fastest first */
#if X86
    {"avx512-bf16", BF16, 0, has_bf16, EACH_M(avx512_bf16), numbers_avx512, lay_bf16, weights_avx512, unpack_avx512},
    {"avx512", FP32, 1, has_vbmi2, EACH_M(avx512), numbers_avx512, lay_fours, weights_avx512, NULL},
    {"avx2", FP32, 1, has_avx2, EACH_M(avx2), numbers_avx2, lay_plain, NULL, NULL},
    {"avx512-vnni", INT8, 1, has_vnni, EACH_M(avx512_vnni), numbers_avx512, record_avx512, weights_avx512, NULL},
    {"avx2-int8", INT8, 0, has_avx2, EACH_M(int8_avx2), numbers_avx2, record_avx2, NULL, NULL},
#endif
    {"portable", FP32, 1, always, EACH_M(portable), numbers_portable, lay_plain, NULL, NULL},
    {"portable-int8", INT8, 1, always, EACH_M(int8_portable), numbers_portable, record_portable, NULL, NULL},
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

const char *kernel_name(int32_t k) { return k >= 0 && k < KERNELS ? kernels[k].name : NULL; }

/* Whether kernel k exists, runs on this CPU and takes weights that are stored and computed with in these dtypes, wide or not, exactly or
 * with activations of 8 bits. */
int32_t kernel_fits(int32_t k, int32_t stored, int32_t dtype, int32_t wide, int32_t int8) {
    if (k < 0 || k >= KERNELS || !kernels[k].runs_here() || (wide && !kernels[k].wide)) return 0;
    if (int8 || kernels[k].dtype == INT8) return int8 && kernels[k].dtype == INT8;
    return kernels[k].dtype == FP32 || (stored == BF16 && dtype == BF16);
}

struct product {
    const struct nested *w;
    const struct kernel *kernel;
    const void *given, *bias; /* of w's dtype */
    const void *x;            /* as the kernel reads it: (m, stride) */
    void *y;
    char *room; /* of each thread, for many tokens; NULL for few */
    int64_t stride;
    int32_t m;
};

/* Add what is listed and the bias, and round, for m rows of x from `from` on. Not inlined: few tokens and many are to have the same
 * instructions, where a compiler would fuse the multiplication and the addition for one of them only. */
__attribute__((noinline)) static void finish(const struct product *p, int64_t tile, int32_t from, int32_t m, const float *sums, int64_t stride) {
    const struct nested *w = p->w;
    for (int64_t i = 0; i < rows_in(w, tile); i++) {
        int64_t row = tile * ROWS + i;
        float bias = p->bias ? get(p->bias, row, w->dtype) : 0;
        for (int64_t j = 0; j < m; j++) {
            float y = sums[j * stride + i];
            for (int64_t e = w->listed[row]; e < w->listed[row + 1]; e++) {
                int64_t c = w->columns_listed[e];
                int q = w->numbers_listed[e], held = (int)escape_of(q) - OFFSET;
                float step = step_of(w, row, c), lacks = weight_of(step, q, w->stored) - weight_of(step, held, w->stored);
                y += lacks * get(p->given, (from + j) * w->columns + c, w->dtype);
            }
            put(p->y, (from + j) * w->rows + row, w->dtype, y + bias);
        }
    }
}

#if X86
/* The same in bf16, of several tiles. */
WITH_AVX512F static void finish_many(const void *job, int64_t which, int64_t tile, int64_t tiles, int32_t from, int32_t m,
                                     const float *sums) {
    const struct product *p = job;
    const struct nested *w = p->w;
    int64_t row = tile * ROWS;
    (void)which;
    if (tiles < TILES || row + TILES * ROWS > w->rows || w->listed[row] < w->listed[row + TILES * ROWS]) {
        for (int64_t t = 0; t < tiles; t++) finish(p, tile + t, from, m, sums + t * ROWS, TILES * ROWS);
        return;
    }
    float bias[TILES * ROWS] = {0};
    for (int i = 0; p->bias && i < TILES * ROWS; i++) bias[i] = get(p->bias, row + i, BF16);
    for (int64_t j = 0; j < m; j++) {
        __m512 y = _mm512_add_ps(_mm512_loadu_ps(sums + j * TILES * ROWS), _mm512_loadu_ps(bias));
        _mm256_storeu_si256((__m256i *)((uint16_t *)p->y + (from + j) * w->rows + row), narrow_16(y));
    }
}
#endif

static void multiply(const void *job, int64_t rank, int64_t first, int64_t last) {
    const struct product *p = job;
    (void)rank;
#if X86
    if (p->room) {
        struct many all = {p->kernel->unpack, finish_many, p, p->x, p->stride, p->m};
        return multiply_many(&all, p->w, 0, first, last, p->room + rank * room_for_many(p->stride, p->m));
    }
#endif
    for (int64_t tile = first; tile < last; tile++)
        for (int32_t done = 0; done < p->m; done += MOST) { /* later passes find the tile in the cache */
            float sums[MOST * ROWS];
            int32_t m = p->m - done < MOST ? p->m - done : MOST;
            p->kernel->tile[m - 1](p->w, tile, (const char *)p->x + done * p->stride * p->kernel->dtype, p->stride, sums);
            finish(p, tile, done, m, sums, ROWS);
        }
}

/* y (m, rows) = x (m, columns) · Wᵀ + bias (rows,) or NULL, all of w's dtype. 0, or -1 if there is no memory. */
int32_t nested_matvec(const struct nested *w, int32_t k, const void *x, int32_t m, const void *bias, void *y, int32_t threads) {
    struct product p = {w, &kernels[k], x, bias, NULL, y, NULL, runs_of(w) * RUN, m};
    int many = m > FEW && p.kernel->unpack;
    if (p.kernel->dtype == INT8) p.stride = record_size(w);
    int64_t size = p.stride * p.kernel->dtype;
    char *laid = aligned_alloc(LINE, (size_t)(m * size + LINE));
    if (laid && many) p.room = aligned_alloc(LANES, (size_t)(room_for_many(p.stride, m) * (threads > 1 ? threads : 1)));
    if (!laid || (many && !p.room)) {
        free(laid);
        return -1;
    }
    for (int64_t j = 0; j < m; j++) p.kernel->lay(w, (const char *)x + j * w->columns * w->dtype, laid + j * size);
    p.x = laid;
    share_out(multiply, &p, tiles_of(w), threads);
    free(laid), free(p.room);
    return 0;
}

struct unpacking {
    const struct nested *w;
    const struct kernel *kernel;
    char *out; /* (rows, columns) of w's dtype, or NULL */
    int8_t *q; /* (rows, columns), or NULL */
};

static void unpack(const void *job, int64_t rank, int64_t first, int64_t last) {
    (void)rank;
    const struct unpacking *u = job;
    const struct nested *w = u->w;
    int64_t groups = (w->columns + w->group - 1) / w->group;
    for (int64_t tile = first; tile < last; tile++) {
        const uint8_t *escapes = w->escapes + w->starts[tile];
        for (int64_t r = 0, of_step = 0, left = w->group; r < runs_of(w); r++, left -= RUN) {
            if (left <= 0) of_step++, left = w->group;
            for (int i = 0; i < rows_in(w, tile); i++) {
                int8_t q[RUN];
                char v[RUN * FP32] __attribute__((aligned(64)));
                int64_t row = tile * ROWS + i, at = row * w->columns + r * RUN;
                int64_t some = w->columns - r * RUN < RUN ? w->columns - r * RUN : RUN;
                float step = widen(w->steps[row * groups + of_step]);
                if (u->kernel->weights && !u->q && some == RUN) {
                    escapes = u->kernel->weights(w, tile, r, i, escapes, step, u->out + at * w->dtype);
                    continue;
                }
                escapes = u->kernel->row(w, tile, r, i, escapes, q);
                if (u->q) memcpy(u->q + at, q, (size_t)some);
                for (int c = 0; u->out && c < RUN; c++) put(v, c, w->dtype, weight_of(step, q[c], w->stored));
                if (u->out) memcpy(u->out + at * w->dtype, v, (size_t)(some * w->dtype));
            }
        }
        for (int64_t row = tile * ROWS; row < tile * ROWS + rows_in(w, tile); row++)
            for (int64_t e = w->listed[row]; e < w->listed[row + 1]; e++) {
                int64_t c = w->columns_listed[e], at = row * w->columns + c;
                int8_t q = w->numbers_listed[e];
                if (u->q) u->q[at] = q;
                if (u->out) put(u->out, at, w->dtype, weight_of(step_of(w, row, c), q, w->stored));
            }
    }
#if X86
    _mm_sfence(); /* what was streamed is seen by whoever is told that this is done */
#endif
}

/* W, of its dtype, or its numbers. */
void nested_unpack(const struct nested *w, int32_t k, void *out, int8_t *q, int32_t threads) {
    struct unpacking u = {w, &kernels[k], out, q};
    share_out(unpack, &u, tiles_of(w), threads);
}
