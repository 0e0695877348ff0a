/* The honest baseline of eval/cpu_speed.py: y = x · Wᵀ with a dense bf16 W, as fast as one can read it.
 *
 * Four rows share x, as in the sparse kernel. On Zen 5 it reads 40 GB/s on one core, what the core can; prefetching ahead
 * by 1, 4, 8 or 16 KB makes it slower by 3 to 9 %, so it does not.
 */
#include "../llmsparse/backends/cpu/tiles.h"

#include <immintrin.h>

enum { MOST = 4 }; /* rows of x in one pass over four of W */

#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))

struct product {
    const uint16_t *w, *x;
    uint16_t *y;
    int64_t rows, columns;
    int32_t m;
};

int32_t dense_runs_here(void) { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16"); }

WITH_BF16 static inline __attribute__((always_inline)) void tile(const struct product *p, int64_t row, int64_t from, const int m) {
    __m512 sum[MOST][ROWS];
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sum[j][i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < p->columns; c += 32) {
        __m512bh x[MOST];
        for (int j = 0; j < m; j++) x[j] = (__m512bh)_mm512_loadu_si512(p->x + (from + j) * p->columns + c);
        for (int i = 0; i < ROWS; i++) {
            __m512bh w = (__m512bh)_mm512_loadu_si512(p->w + (row + i) * p->columns + c);
            for (int j = 0; j < m; j++) sum[j][i] = _mm512_dpbf16_ps(sum[j][i], w, x[j]);
        }
    }
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) {
            float y = _mm512_reduce_add_ps(sum[j][i]);
            uint32_t bits;
            memcpy(&bits, &y, 4);
            p->y[(from + j) * p->rows + row + i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
}

WITH_BF16 static void member(void *data) {
    const struct product *p = data;
    int64_t tiles = p->rows / ROWS, rank = parallel ? team_rank() : 0, size = parallel ? team_size() : 1;
    for (int64_t t = tiles * rank / size; t < tiles * (rank + 1) / size; t++)
        for (int64_t from = 0; from < p->m; from += MOST) switch (p->m - from) {
            case 1: tile(p, t * ROWS, from, 1); break;
            case 2: tile(p, t * ROWS, from, 2); break;
            case 3: tile(p, t * ROWS, from, 3); break;
            default: tile(p, t * ROWS, from, 4);
            }
}

/* y (m, rows) = x (m, columns) · Wᵀ; rows is a multiple of 4, columns of 32. */
void dense_matvec(const uint16_t *w, const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns, int32_t m, int32_t threads) {
    struct product p = {w, x, y, rows, columns, m};
    if (parallel) parallel(member, &p, (unsigned)threads, 0);
    else member(&p);
}
