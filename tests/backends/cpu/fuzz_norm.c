/* Random rows through everything that norm.c exports, every buffer exactly as long as it must be. Built with sanitizers by
 * test_sanitized.py: `fuzz_norm ROUNDS SEED`. Exit 1 where a result is wrong; the sanitizers say the rest. */
#include <stdlib.h>

#include "norm.c"

#include "fuzz.h"

int main(int count, char **arguments) {
    if (count != 3) return 2;
    state = 88172645463325252ULL + strtoull(arguments[2], NULL, 10);
    use_team(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
    for (long round = 0; round < atol(arguments[1]); round++) {
        int dtype = draw(2) ? FP32 : BF16;
        int64_t rows = 1 + (int64_t)draw(9), width = 1 + (int64_t)draw(300), row = (int64_t)draw((uint64_t)rows), c = (int64_t)draw((uint64_t)width);
        void *x = buffer(rows * width, dtype), *w = buffer(width, dtype);
        fill(x, rows * width, dtype), fill(w, width, dtype);
        double total = 0;
        for (int64_t i = 0; i < width; i++) total += (double)get(x, row * width + i, dtype) * get(x, row * width + i, dtype);
        double right = get(x, row * width + c, dtype) / sqrt(total / (double)width + 1e-6) * get(w, c, dtype);
        for (int k = 0; kernel_name(k); k++) {
            if (!kernel_fits(k, dtype)) continue;
            void *y = buffer(rows * width, dtype);
            rms_norm(k, x, w, y, rows, width, 1e-6f, 1 + (int)draw(4));
            if (!(fabs(get(y, row * width + c, dtype) - right) <= (dtype == BF16 ? 1.0 / 128 : 1e-5) * fabs(right))) {
                printf("%s is wrong\n", kernel_name(k));
                return 1;
            }
            free(y);
        }
        free(x), free(w);
    }
    puts("all right");
    return 0;
}
