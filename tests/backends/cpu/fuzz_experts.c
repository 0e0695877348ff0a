/* Random mixtures through everything that experts.c exports, every buffer exactly as long as it must be. Built with
 * sanitizers by test_sanitized.py: `fuzz_experts ROUNDS SEED`. Exit 1 where a result is wrong; the sanitizers say the rest. */
#include "experts.c"

#include "fuzz.h"

struct drawn {
    struct experts e;
    int32_t tokens, choices;
    void *gate, *up, *down, *x;
    int64_t *index;
    float *shares;
};

static struct drawn random_mixture(void) {
    struct drawn d = {.tokens = (int32_t)draw(10), .choices = (int32_t)draw(5)};
    int64_t count = 1 + (int64_t)draw(6), width = 1 + (int64_t)draw(draw(2) ? 40 : 300), inner = 1 + (int64_t)draw(40);
    int32_t dtype = draw(2) ? FP32 : BF16;
    d.gate = buffer(count * inner * width, dtype), d.up = buffer(count * inner * width, dtype);
    d.down = buffer(count * width * inner, dtype), d.x = buffer(d.tokens * width, dtype);
    fill(d.gate, count * inner * width, dtype), fill(d.up, count * inner * width, dtype);
    fill(d.down, count * width * inner, dtype), fill(d.x, d.tokens * width, dtype);
    d.index = buffer(d.tokens * d.choices, sizeof *d.index), d.shares = buffer(d.tokens * d.choices, sizeof *d.shares);
    fill(d.shares, d.tokens * d.choices, FP32);
    for (int64_t p = 0; p < d.tokens * d.choices; p++) d.index[p] = (int64_t)draw((uint64_t)count + 2) - (draw(9) ? 0 : INT64_MAX);
    int64_t step = inner * width * dtype;
    d.e = (struct experts){d.gate, d.up, d.down, step, step, count, width, inner, dtype};
    return d;
}

static double row_dot(const void *weight, int64_t row, const struct drawn *d, int64_t token) {
    double sum = 0;
    for (int64_t c = 0; c < d->e.width; c++)
        sum += (double)get(weight, row * d->e.width + c, d->e.dtype) * get(d->x, token * d->e.width + c, d->e.dtype);
    return sum;
}

/* What y must be, and the sum of its terms' magnitudes. */
static void wanted(const struct drawn *d, int64_t token, int64_t row, double *y, double *magnitude) {
    *y = *magnitude = 0;
    for (int64_t p = token * d->choices; p < (token + 1) * d->choices; p++)
        if (d->index[p] >= 0 && d->index[p] < d->e.count)
            for (int64_t i = 0; i < d->e.inner; i++) {
                int64_t at = d->index[p] * d->e.inner + i;
                double gate = row_dot(d->gate, at, d, token), down = get(d->down, (d->index[p] * d->e.width + row) * d->e.inner + i, d->e.dtype);
                double term = d->shares[p] * down * gate / (1 + exp(-gate)) * row_dot(d->up, at, d, token);
                *y += term, *magnitude += fabs(term) + 1e-2;
            }
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    state = 88172645463325252ULL + strtoull(arguments[2], NULL, 10);
    use_team(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
    for (long round = 0; round < atol(arguments[1]); round++) {
        struct drawn d = random_mixture();
        void *y = buffer(d.tokens * d.e.width, d.e.dtype);
        int64_t token = d.tokens ? (int64_t)draw((uint64_t)d.tokens) : 0, row = (int64_t)draw((uint64_t)d.e.width);
        double value, magnitude;
        if (d.tokens) wanted(&d, token, row, &value, &magnitude);
        for (int k = 0; kernel_name(k); k++) {
            if (!kernel_fits(k, d.e.dtype)) continue;
            if (run_experts(&d.e, k, d.x, d.tokens, d.index, d.shares, d.choices, y, 1 + (int)draw(4))) return 1;
            double bound = d.e.dtype == BF16 ? 1.0 / 128 : 1e-5;
            if (d.tokens && !(fabs(get(y, token * d.e.width + row, d.e.dtype) - value) <= bound * magnitude)) {
                printf("%s is wrong\n", kernel_name(k));
                return 1;
            }
        }
        free(y), free(d.gate), free(d.up), free(d.down), free(d.x), free(d.index), free(d.shares);
    }
    puts("all right");
    return 0;
}
