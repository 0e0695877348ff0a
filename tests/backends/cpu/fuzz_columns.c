/* Random weights by columns, dense and packed, through everything that columns.c exports, every buffer exactly as long as it must
 * be. Built with sanitizers by test_sanitized.py: `fuzz_columns ROUNDS SEED`. Exit 1 where a result is wrong. */
#include "columns.c"

#include "fuzz.h"

enum { SLACK = 64 };

int main(int count, char **arguments) {
    if (count != 3) return 2;
    state = 88172645463325252ULL + strtoull(arguments[2], NULL, 10);
    use_team(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
    for (long round = 0; round < atol(arguments[1]); round++) {
        int32_t dtype = draw(2) ? FP32 : BF16, m = 1 + (int32_t)draw(MOST), packed = (int32_t)draw(2);
        int64_t rows = 1 + (int64_t)draw(draw(4) ? 80 : draw(8) ? 1200 : 9000), columns = 1 + (int64_t)draw(30);
        int64_t groups = groups_of(rows), tiles = tiles_of(rows), kept = 0;
        void *w = buffer(columns * rows, dtype), *x = buffer(m * columns, dtype), *bias = draw(2) ? buffer(rows, dtype) : NULL;
        uint32_t *masks = buffer(columns * groups, sizeof *masks);
        int64_t *starts = buffer(columns * tiles, sizeof *starts);
        float *norms = draw(2) ? buffer(columns, FP32) : NULL, *centre = draw(2) ? buffer(columns, FP32) : NULL;
        fill(w, columns * rows, dtype), fill(x, m * columns, dtype);
        if (bias) fill(bias, rows, dtype);
        if (centre) fill(centre, columns, FP32);
        for (int64_t i = 0; norms && i < columns; i++) norms[i] = (float)draw(100) / 50;
        memset(masks, 0, (size_t)(columns * groups) * sizeof *masks);
        for (int64_t i = 0; i < columns; i++)
            for (int64_t r = 0; r < rows; r++) {
                if (r % TILE == 0) starts[i * tiles + r / TILE] = kept;
                if (packed && draw(3)) put(w, i * rows + r, dtype, 0);
                else masks[i * groups + r / GROUP] |= 1u << r % GROUP, kept++;
            }
        char *values = malloc((size_t)(kept * dtype) + SLACK); /* never looked at behind the last but for its place */
        memset(values, 0xff, (size_t)(kept * dtype) + SLACK);
        for (int64_t i = 0, at = 0; i < columns * rows; i++)
            if (masks[i / rows * groups + i % rows / GROUP] >> i % rows % GROUP & 1)
                memcpy(values + at++ * dtype, (char *)w + i * dtype, (size_t)dtype);
        struct matrix matrix = {packed ? values : w, packed ? masks : NULL, packed ? starts : NULL, rows, columns, dtype};
        int64_t keep = draw(2) ? -1 : (int64_t)draw((uint64_t)columns + 1);
        struct rule rule = {norms, centre, (float)draw(100) / 100, keep};
        int64_t row = (int64_t)draw((uint64_t)rows), token = (int64_t)draw((uint64_t)m);
        double wanted = bias ? get(bias, row, dtype) : 0, magnitude = fabs(wanted);
        float *scores = buffer(columns, FP32), *moved = buffer(columns, FP32);
        for (int64_t i = 0; i < columns; i++) {
            moved[i] = get(x, token * columns + i, dtype) - (centre ? centre[i] : 0);
            if (dtype == BF16) moved[i] = widen(narrow(moved[i]));
            scores[i] = fabsf(moved[i]) * (norms ? norms[i] : 1);
        }
        for (int64_t i = 0; i < columns; i++) {
            int64_t above = 0;
            for (int64_t other = 0; other < columns; other++) above += scores[other] > scores[i];
            if (keep < 0 ? scores[i] <= rule.threshold : above >= keep) continue;
            double term = (double)get(w, i * rows + row, dtype) * moved[i];
            wanted += term, magnitude += fabs(term);
        }
        for (int k = 0; kernel_name(k); k++) {
            if (!kernel_fits(k, dtype, packed)) continue;
            void *y = buffer(m * rows, dtype);
            if (columns_product(&matrix, &rule, k, x, m, bias, y, 1 + (int)draw(4)) < 0) return 1;
            double off = fabs(get(y, token * rows + row, dtype) - wanted);
            if (!(off <= (dtype == BF16 ? fabs(wanted) / 256 : 0) + 1e-5 * magnitude)) {
                printf("%s is wrong\n", kernel_name(k));
                return 1;
            }
            free(y);
        }
        if (packed) {
            void *dense = buffer(columns * rows, dtype);
            columns_expand(&matrix, dense, 1 + (int)draw(4));
            for (int64_t i = 0; i < columns * rows; i++)
                if (get(dense, i, dtype) != get(w, i, dtype)) return puts("expanded wrongly"), 1;
            free(dense);
        }
        free(w), free(x), free(bias), free(masks), free(starts), free(norms), free(centre), free(values), free(scores), free(moved);
    }
    puts("all right");
    return 0;
}
