/* Random dense weights through everything that dense.c exports, every buffer exactly as long as it must be. Built with
 * sanitizers by test_sanitized.py: `fuzz_dense ROUNDS SEED`. Exit 1 where a result is wrong; the sanitizers say the rest. */
#include "dense.c"

#include "fuzz.h"

int main(int count, char **arguments) {
    if (count != 3) return 2;
    state = 88172645463325252ULL + strtoull(arguments[2], NULL, 10);
    use_team(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
    for (long round = 0; round < atol(arguments[1]); round++) {
        int32_t dtype = draw(2) ? FP32 : BF16, m = 1 + (int32_t)draw(10);
        int64_t rows = 1 + (int64_t)draw(30), columns = 1 + (int64_t)draw(draw(2) ? 40 : 300);
        void *w = buffer(rows * columns, dtype), *x = buffer(m * columns, dtype), *bias = draw(2) ? buffer(rows, dtype) : NULL;
        fill(w, rows * columns, dtype), fill(x, m * columns, dtype);
        if (bias) fill(bias, rows, dtype);
        int64_t row = (int64_t)draw((uint64_t)rows), token = (int64_t)draw((uint64_t)m);
        double wanted = bias ? get(bias, row, dtype) : 0, magnitude = fabs(wanted);
        for (int64_t c = 0; c < columns; c++) {
            double term = (double)get(w, row * columns + c, dtype) * get(x, token * columns + c, dtype);
            wanted += term, magnitude += fabs(term);
        }
        for (int k = 0; kernel_name(k); k++) {
            if (!kernel_fits(k, dtype)) continue;
            void *y = buffer(m * rows, dtype);
            if (dense_matvec(w, rows, columns, k, x, m, bias, y, 1 + (int)draw(4))) return 1;
            double off = fabs(get(y, token * rows + row, dtype) - wanted);
            if (!(off <= (dtype == BF16 ? fabs(wanted) / 256 : 0) + 1e-5 * magnitude)) {
                printf("%s is wrong\n", kernel_name(k));
                return 1;
            }
            free(y);
        }
        free(w), free(x), free(bias);
    }
    puts("all right");
    return 0;
}
