/* Random small integers through everything that nested.c exports, every buffer exactly as long as it must be, and random bytes
 * through its decoder. Built with sanitizers by test_sanitized.py: `fuzz_nested ROUNDS SEED`. */
#define BAND 128 /* columns, so that sums are set aside and gone on with */
#include "nested.c"

#include "fuzz.h"

enum { DAMAGES = 20 };

static void fail(const char *what, const struct nested *w, const char *kernel) {
    printf("%s is wrong at %ld x %ld with %s\n", what, (long)w->rows, (long)w->columns, kernel);
    exit(1);
}

static double weight_at(const struct nested *w, const int8_t *q, int64_t r, int64_t c) {
    return weight_of(step_of(w, r, c), q[r * w->columns + c], w->stored);
}

/* How far a number of a row of x may be off in 8 bits, and a weight's product with it where that is not rounded: (columns,). */
static double *in_8_bits(const struct nested *w, const void *x, int64_t row) {
    double *off = buffer(w->columns, sizeof *off);
    for (int64_t first = 0; first < w->columns; first += span_of(w)) {
        int64_t last = first + span_of(w) < w->columns ? first + span_of(w) : w->columns;
        double largest = 0;
        for (int64_t c = first; c < last; c++) largest = fmax(largest, fabs(get(x, row * w->columns + c, w->dtype)));
        for (int64_t c = first; c < last; c++) off[c] = largest / 253 + fabs(get(x, row * w->columns + c, w->dtype)) / 128;
    }
    return off;
}

static void product(const struct nested *w, const int8_t *q, int32_t k) {
    int m = 1 + (int)draw(20), with_bias = (int)draw(2), dtype = w->dtype;
    void *x = buffer(m * w->columns, dtype), *y = buffer(m * w->rows, dtype), *bias = buffer(w->rows, dtype);
    fill(x, m * w->columns, dtype), fill(bias, w->rows, dtype);
    int threads = 1 + (int)draw(4), among_others = !draw(8), failed = 0;
#pragma omp parallel num_threads(2) if (among_others) /* the last thread of a team that is not ours */
    if (omp_get_thread_num() == omp_get_num_threads() - 1) failed = nested_matvec(w, k, x, m, with_bias ? bias : NULL, y, threads);
    if (failed) exit(1);
    for (int64_t j = 0; j < m; j++) {
        double *off = kernels[k].dtype == INT8 ? in_8_bits(w, x, j) : NULL;
        for (int64_t r = 0; r < w->rows; r++) {
            double wanted = with_bias ? get(bias, r, dtype) : 0, magnitude = fabs(wanted), rounding = 0;
            for (int64_t c = 0; c < w->columns; c++) {
                double term = weight_at(w, q, r, c) * get(x, j * w->columns + c, dtype);
                wanted += term, magnitude += fabs(term);
                if (off) rounding += fabs(weight_at(w, q, r, c)) * off[c];
            }
            double bound = (dtype == BF16 ? 1.0 / 256 : 1e-7) * (fabs(wanted) + rounding) + 1e-6 * magnitude + rounding;
            if (!(fabs(get(y, j * w->rows + r, dtype) - wanted) <= bound)) fail("product", w, kernel_name(k));
        }
        free(off);
    }
    free(x), free(y), free(bias);
}

static void whole(const struct nested *w, const int8_t *q, int32_t k) {
    void *out = buffer(w->rows * w->columns, w->dtype);
    int8_t *numbers = buffer(w->rows * w->columns, 1);
    nested_unpack(w, k, out, numbers, 1 + (int)draw(3));
    for (int64_t i = 0; i < w->rows * w->columns; i++) {
        if (numbers[i] != q[i]) fail("a number", w, kernel_name(k));
        float wanted = (float)weight_at(w, q, i / w->columns, i % w->columns);
        if (get(out, i, w->dtype) != (w->dtype == BF16 ? widen(narrow(wanted)) : wanted)) fail("unpacked", w, kernel_name(k));
    }
    free(out), free(numbers);
}

static void kernels_agree(void) {
    int64_t rows = (int64_t)draw(draw(4) ? 12 : 41), columns = 1 + (int64_t)draw(draw(2) ? 70 : 400), group = draw(3) ? columns : RUN;
    int64_t groups = (columns + group - 1) / group, tiles = (rows + ROWS - 1) / ROWS, runs = (columns + RUN - 1) / RUN;
    int spread = (int[]){1, 2, 5, 127}[draw(4)], wide = (int)draw(2), zeros = (int)draw(11);
    int8_t *q = buffer(rows * columns, 1);
    for (int64_t i = 0; i < rows * columns; i++) q[i] = (int8_t)((int)draw(10) < zeros ? 0 : (int)draw(2 * (uint64_t)spread + 1) - spread);
    uint16_t *steps = buffer(rows * groups, BF16);
    fill(steps, rows * groups, BF16);
    int64_t *starts = buffer(tiles + 1, 8), *listed = buffer(rows + 1, 8);
    struct nested w = {.starts = starts, .listed = listed, .steps = steps, .rows = rows, .columns = columns, .group = group, .wide = wide,
                       .stored = draw(2) ? FP32 : BF16, .dtype = draw(2) ? FP32 : BF16};
    uint8_t *counts = buffer(wide ? 0 : tiles * runs * ROWS / 2, 1);
    w.counts = counts;
    nested_measure(&w, q, starts, listed, counts);
    int64_t pairs = tiles * runs * (wide ? ROWS * 8 : RUN);
    w.pairs = calloc((size_t)pairs + 1, 1), w.escapes = calloc((size_t)starts[tiles] + SLACK, 1);
    w.columns_listed = buffer(listed[rows], 4), w.numbers_listed = buffer(listed[rows], 1);
    nested_fill(&w, q);
    for (int32_t k = 0; kernel_name(k); k++)
        if (rows && (kernel_fits(k, w.stored, w.dtype, wide, 0) || kernel_fits(k, w.stored, w.dtype, wide, 1))) product(&w, q, k), whole(&w, q, k);
    free(q), free(steps), free(starts), free(listed), free(counts), free((void *)w.pairs), free((void *)w.escapes);
    free((void *)w.columns_listed), free((void *)w.numbers_listed);
}

static void decoder_stays_inside(void) {
    struct code code = {.levels = 1 + (int)draw(6)};
    int reached = 0;
    for (int l = 0; l < code.levels; l++) {
        int width = 1 + (int)draw(l == code.levels - 1 ? 8 : 3), last = l == code.levels - 1;
        code.digits[l] = width, code.fours[l] = width == 1 && l != 1 && draw(2);
        reached = l == 0 ? (1 << (width - 1)) - 1 : reached + (1 << (width - (l == 1))) - !last;
        code.finals[l] = reached;
    }
    for (int n = 0; n < DAMAGES; n++) {
        int64_t size = (int64_t)draw(60), first[2] = {0, (int64_t)draw(9)}, tiles[2] = {0, size}, columns = 1 + (int64_t)draw(40);
        uint8_t *stream = buffer(size, 1);
        int8_t *q = buffer(first[1] * columns, 1);
        int32_t right;
        for (int64_t i = 0; i < size; i++) stream[i] = (uint8_t)(draw(3) ? draw(256) : 0);
        nested_decode(stream, tiles, first, 1, columns, &code, q, &right, 1);
        free(stream), free(q);
    }
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 100;
    state = 88172645463325252ull + (argc > 2 ? (uint64_t)atoll(argv[2]) * 7919 : 0);
    use_team(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
    for (int n = 0; n < rounds; n++) kernels_agree(), decoder_stays_inside();
    puts("all right");
}
