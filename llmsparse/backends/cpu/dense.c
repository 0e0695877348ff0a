/* y = x · Wᵀ (+ bias) for a dense W (out, in) that lies as it is and a few rows of x, as fast as W can be read. */
#include "rows.h"

struct product {
    const struct kernel *kernel;
    const char *w, *x; /* (rows, columns) of dtype, (m, stride) of the kernel's x_dtype, zero behind the last column */
    const void *bias;
    void *y;
    int64_t rows, columns, stride;
    int32_t m;
};

/* Tiles `first` to `last` of the rows of W. */
static void multiply(const void *job, int64_t rank, int64_t first, int64_t last) {
    (void)rank;
    const struct product *p = job;
    int32_t dtype = p->kernel->dtype;
    for (int64_t row = first * ROWS; row < last * ROWS; row += ROWS) {
        const char *w[ROWS];
        rows_of(p->w, row, p->rows, p->columns * dtype, w);
        for (int32_t from = 0, m; from < p->m; from += m) { /* later passes find the rows in the cache */
            m = in_a_pass(p->kernel, p->columns, p->m - from);
            const char *x[MOST];
            float sums[MOST * ROWS];
            for (int j = 0; j < m; j++) x[j] = p->x + (from + j) * p->stride * p->kernel->x_dtype;
            p->kernel->tile[m - 1](w, x, p->columns, sums);
            for (int64_t i = 0; i < ROWS && row + i < p->rows; i++)
                for (int j = 0; j < m; j++)
                    put(p->y, (from + j) * p->rows + row + i, dtype, sums[j * ROWS + i] + (p->bias ? get(p->bias, row + i, dtype) : 0));
        }
    }
}

/* y (m, rows) = x (m, columns) · Wᵀ + bias (rows,) or NULL, all of the kernel's dtype. 0, or -1 if there is no memory. */
int32_t dense_matvec(const void *w, int64_t rows, int64_t columns, int32_t k, const void *x, int32_t m, const void *bias,
                     void *y, int32_t threads) {
    size_t copied = (size_t)(m * padded(columns)) * (size_t)kernels[k].x_dtype;
    char *copy = calloc(copied + 1, 1);
    if (!copy) return -1;
    const char *ready = as_read(&kernels[k], x, m, columns, copy);
    struct product p = {&kernels[k], w, ready, bias, y, rows, columns, padded(columns), m};
    share_out(multiply, &p, tiles_of(rows), threads);
    free(copy);
    return 0;
}
