/* Random matrices through everything that bitmask.c exports, every buffer exactly as long as it must be. Built with
 * sanitizers by test_sanitized.py: `fuzz ROUNDS SEED`. Exit 1 where a result is wrong; the sanitizers say the rest. */
#define BAND 64 /* columns, so that sums are set aside and gone on with */
#include "bitmask.c"

#include "fuzz.h"

enum { DAMAGES = 50 };

static void fail(const char *what, int64_t rows, int64_t columns, const char *kernel) {
    printf("%s is wrong at %ld x %ld with %s\n", what, (long)rows, (long)columns, kernel);
    exit(1);
}

static void product(const struct weight *w, const void *dense, int32_t k, int x_dtype) {
    int m = 1 + (int)draw(20), count = 1 + (int)draw(3), bias_dtype = draw(2) ? FP32 : BF16, with_bias = (int)draw(2);
    void *x = buffer(m * w->columns, x_dtype), *y = buffer(m * w->rows, x_dtype), *bias = buffer(w->rows, bias_dtype);
    fill(x, m * w->columns, x_dtype), fill(bias, w->rows, bias_dtype);
    const struct weight *weights[] = {w, w, w}; /* the last of them is looked at */
    struct target targets[3];
    for (int i = 0; i < count; i++)
        targets[i] = (struct target){with_bias ? bias : NULL, i + 1 < count ? buffer(m * w->rows, x_dtype) : y, bias_dtype};
    int threads = 1 + (int)draw(4), among_others = !draw(8), failed = 0;
#pragma omp parallel num_threads(2) if (among_others) /* the last thread of a team that is not ours */
    if (omp_get_thread_num() == omp_get_num_threads() - 1) failed = matvec(weights, targets, count, k, x, x_dtype, m, threads);
    if (failed) exit(1);
    for (int64_t j = 0; j < m; j++)
        for (int64_t r = 0; r < w->rows; r++) {
            double wanted = with_bias ? get(bias, r, bias_dtype) : 0, magnitude = fabs(wanted);
            for (int64_t c = 0; c < w->columns; c++) {
                double term = (double)get(dense, r * w->columns + c, w->dtype) * get(x, j * w->columns + c, x_dtype);
                wanted += term, magnitude += fabs(term);
            }
            double bound = (x_dtype == BF16 ? 1.0 / 256 : 1e-7) * fabs(wanted) + 1e-6 * magnitude;
            if (!(fabs(get(y, j * w->rows + r, x_dtype) - wanted) <= bound)) fail("product", w->rows, w->columns, kernel_name(k));
        }
    for (int i = 0; i + 1 < count; i++) free(targets[i].y);
    free(x), free(y), free(bias);
}

struct neutral {
    int64_t rows, columns, width, nnz;
    int dtype;
    char *dense, *values;
    uint8_t *mask;
    int64_t *offsets;
};

static struct neutral random_matrix(void) {
    struct neutral n = {.rows = (int64_t)draw(draw(4) ? 12 : 41), .columns = 1 + (int64_t)draw(draw(2) ? 40 : 300), .dtype = draw(2) ? FP32 : BF16};
    n.width = (n.columns + 7) / 8;
    n.dense = buffer(n.rows * n.columns, n.dtype), n.mask = buffer(n.rows * n.width, 1);
    n.offsets = buffer(n.rows + 1, sizeof *n.offsets);
    int tenths = (int)draw(11);
    if (n.rows) memset(n.mask, 0, (size_t)(n.rows * n.width));
    fill(n.dense, n.rows * n.columns, n.dtype);
    n.offsets[0] = 0;
    for (int64_t r = 0; r < n.rows; n.offsets[++r] = n.nnz)
        for (int64_t c = 0; c < n.columns; c++)
            if ((int)draw(10) < tenths) n.mask[r * n.width + c / 8] |= (uint8_t)(1 << c % 8), n.nnz++;
            else put(n.dense, r * n.columns + c, n.dtype, 0);
    n.values = buffer(n.nnz, n.dtype);
    char *next = n.values;
    for (int64_t i = 0; i < n.rows * n.columns; i++)
        if (n.mask[i / n.columns * n.width + i % n.columns / 8] >> i % n.columns % 8 & 1)
            memcpy(next, n.dense + i * n.dtype, (size_t)n.dtype), next += n.dtype;
    return n;
}

static void try_all(const struct neutral *n) {
    int64_t tiles = (n->rows + ROWS - 1) / ROWS, words = tiles * ((n->columns + COLUMNS - 1) / COLUMNS) * ROWS;
    int64_t *starts = buffer(tiles + 1, sizeof *starts), *offsets = buffer(n->rows + 1, sizeof *offsets);
    for (int64_t t = 0; t <= tiles; t++) starts[t] = n->offsets[t < tiles ? t * ROWS : n->rows];
    struct weight w = {buffer(n->nnz + SLACK, n->dtype), calloc((size_t)words, 4), starts, n->rows, n->columns, n->dtype};
    repack(&w, n->values, n->mask, n->offsets, 1 + (int)draw(4));
    char *dense = buffer(n->rows * n->columns, n->dtype), *values = buffer(n->nnz, n->dtype);
    uint8_t *mask = buffer(n->rows * n->width, 1);
    for (int k = 0; kernel_name(k); k++) {
        if (kernel_fits(k, n->dtype, BF16)) product(&w, n->dense, k, BF16);
        if (kernel_fits(k, n->dtype, FP32)) product(&w, n->dense, k, FP32);
        if (!kernel_fits(k, n->dtype, n->dtype)) continue;
        expand(&w, k, dense, 1 + (int)draw(4));
        for (int64_t b = 0; b < n->rows * n->columns * n->dtype; b++)
            if (dense[b] != n->dense[b]) fail("unpacking", n->rows, n->columns, kernel_name(k));
    }
    offsets[0] = 0;
    restore(&w, values, mask, offsets, 1 + (int)draw(4));
    if (n->nnz && memcmp(values, n->values, (size_t)(n->nnz * n->dtype))) fail("values", n->rows, n->columns, "restore");
    if (n->rows && memcmp(mask, n->mask, (size_t)(n->rows * n->width))) fail("mask", n->rows, n->columns, "restore");
    if (memcmp(offsets, n->offsets, (size_t)(n->rows + 1) * 8)) fail("offsets", n->rows, n->columns, "restore");
    free(starts), free(offsets), free(w.values), free(w.masks), free(dense), free(values), free(mask);
}

/* A flipped bit is found; whatever else is done to mask, offsets and count is found, or leaves a matrix that is sound in
 * itself: then everything must work with the values that there are. */
static void damage(const struct neutral *n, int times) {
    if (first_bad_row(n->mask, n->offsets, n->rows, n->columns, n->nnz) != -1) fail("check", n->rows, n->columns, "it");
    if (!n->rows) return;
    int64_t at = (int64_t)draw((uint64_t)(n->rows * n->width)), edges[] = {0, -1, 1, INT64_MAX, INT64_MIN, n->nnz, n->nnz + 1, INT32_MAX};
    n->mask[at] ^= 1;
    if (first_bad_row(n->mask, n->offsets, n->rows, n->columns, n->nnz) == -1) fail("damage", n->rows, n->columns, "it");
    n->mask[at] ^= 1;
    for (int t = 0; t < times; t++) {
        struct neutral m = {n->rows, n->columns, n->width, n->nnz, n->dtype, NULL, n->values, buffer(n->rows * n->width, 1), buffer(n->rows + 1, 8)};
        memcpy(m.mask, n->mask, (size_t)(n->rows * n->width)), memcpy(m.offsets, n->offsets, (size_t)(n->rows + 1) * 8);
        for (int changes = 1 + (int)draw(4); changes; changes--) {
            int64_t row = (int64_t)draw((uint64_t)n->rows), byte = row * n->width + (int64_t)draw((uint64_t)n->width);
            int64_t twin = row * n->width + (int64_t)draw((uint64_t)n->width), offset = (int64_t)draw((uint64_t)n->rows + 1);
            switch (draw(6)) {
            case 0: m.mask[byte] ^= (uint8_t)(1 << draw(8)); break;
            case 1: m.mask[byte] = (uint8_t)draw(256); break;
            case 2: { uint8_t other = m.mask[byte]; m.mask[byte] = m.mask[twin], m.mask[twin] = other; break; } /* as many bits */
            case 3: m.offsets[offset] = draw(2) ? edges[draw(sizeof edges / sizeof *edges)] : (int64_t)draw(UINT64_MAX); break;
            case 4: m.offsets[offset] = (int64_t)((uint64_t)m.offsets[offset] + draw(5) - 2); break;
            case 5: m.nnz += (int64_t)draw(3) - 1; break;
            }
        }
        if (m.nnz >= 0 && m.nnz <= n->nnz && first_bad_row(m.mask, m.offsets, m.rows, m.columns, m.nnz) == -1) {
            m.dense = buffer(m.rows * m.columns, m.dtype);
            char *next = m.values;
            for (int64_t i = 0; i < m.rows * m.columns; i++)
                if (m.mask[i / m.columns * m.width + i % m.columns / 8] >> i % m.columns % 8 & 1)
                    memcpy(m.dense + i * m.dtype, next, (size_t)m.dtype), next += m.dtype;
                else put(m.dense, i, m.dtype, 0);
            try_all(&m);
            free(m.dense);
        } else if (m.nnz != n->nnz) first_bad_row(m.mask, m.offsets, m.rows, m.columns, m.nnz);
        free(m.mask), free(m.offsets);
    }
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    state = 88172645463325252ULL + strtoull(arguments[2], NULL, 10);
    use_team(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
    for (long round = 0; round < atol(arguments[1]); round++) {
        struct neutral n = random_matrix();
        try_all(&n), damage(&n, DAMAGES);
        free(n.dense), free(n.values), free(n.mask), free(n.offsets);
    }
    puts("all right");
    return 0;
}
