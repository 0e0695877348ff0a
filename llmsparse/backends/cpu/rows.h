/* Products with a few rows of a weight that lies as it is: kernels, and how rows are shared out to threads.
 *
 * Rows are taken ROWS at a time, which stay in the cache while MOST tokens after MOST tokens pass over them. A sum is always made by
 * one thread in one order, in float32: the result does not depend on the number of threads.
 */
#include <stdlib.h>

#include "floats.h"
#include "share.h"

enum { ROWS = 4, COLUMNS = 32, CHAINS = 4 };
enum { MOST = 4 };     /* tokens in one pass over a tile */
enum { L1 = 32 << 10 }; /* bytes of x that the cache keeps beside a stream of weights */
enum { AHEAD = 4096 }; /* bytes prefetched ahead: of 0, 2, 4 and 8 KB the best on Zen 5, 1.2 to 1.4 times none */

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
#include "rows_x86.h"
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

static int64_t tiles_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }
static int64_t padded(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS; }
/* How many of `left` tokens pass over a tile at once: MOST, or as many as stay in the L1 cache meanwhile. */
static int32_t in_a_pass(const struct kernel *k, int64_t columns, int32_t left) {
    int64_t fit = L1 / (columns * k->x_dtype), most = fit < 1 ? 1 : fit < MOST ? fit : MOST;
    return left < most ? left : (int32_t)most;
}

/* The rows of a tile; the last row again in place of those that are not there. */
static void rows_of(const char *weight, int64_t row, int64_t rows, int64_t row_bytes, const char **w) {
    for (int64_t i = 0; i < ROWS; i++) w[i] = weight + (row + i < rows ? row + i : rows - 1) * row_bytes;
}

/* x (m, columns) of the weight's dtype as the kernel reads it, each row filled up with zeros to whole groups: x itself if it is
 * so already, else in `copy`, which is zero. */
static const char *as_read(const struct kernel *k, const char *x, int64_t m, int64_t columns, char *copy) {
    if (columns == padded(columns) && k->x_dtype == k->dtype) return x;
    for (int64_t j = 0; j < m; j++) {
        const char *row = x + j * columns * k->dtype;
        char *to = copy + j * padded(columns) * k->x_dtype;
        if (k->x_dtype == k->dtype) memcpy(to, row, (size_t)(columns * k->dtype));
        else
            for (int64_t c = 0; c < columns; c++) put(to, c, k->x_dtype, get(row, c, k->dtype));
    }
    return copy;
}

