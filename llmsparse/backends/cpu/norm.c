/* y = w ∘ x / √(mean x² + ε), row by row: RMSNorm as transformers' models have it, rounded where they round. */
#include <math.h>

#include "lanes.h"
#include "team.h"

enum { CHAINS = 4 };

struct norm {
    const char *x, *w; /* (rows, width), (width,) */
    char *y;
    int64_t rows, width;
    float eps;
};

INLINE void norm_rows(const struct norm *n, int64_t first, int64_t last, int dtype) {
    int64_t width = n->width, vectors = (width + LANES - 1) / LANES;
    for (int64_t row = first; row < last; row++) {
        const char *x = n->x + row * width * dtype;
        char *y = n->y + row * width * dtype;
        lanes sum[CHAINS] = {{0}};
        int64_t c = 0;
        for (; c + CHAINS <= width / LANES; c += CHAINS)
            UNROLL for (int u = 0; u < CHAINS; u++) {
                lanes v = load(x + (c + u) * LANES * dtype, dtype);
                sum[u] += v * v;
            }
        for (; c < vectors; c++) {
            lanes v = load_some(x, c, width, dtype);
            sum[0] += v * v;
        }
        lanes all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        float total = 0;
        for (int l = 0; l < LANES; l++) total += all[l];
        float scale = 1 / sqrtf(total / (float)width + n->eps);
        for (c = 0; c < vectors; c++)
            store_some(y, c, width, load_some(n->w, c, width, dtype) * rounded(load_some(x, c, width, dtype) * scale, dtype), dtype);
    }
}

typedef void kernel_function(const struct norm *n, int64_t first, int64_t last);
#define KERNEL(name, target)                                                                                              \
    target static void name##_bf16(const struct norm *n, int64_t first, int64_t last) { norm_rows(n, first, last, BF16); } \
    target static void name##_fp32(const struct norm *n, int64_t first, int64_t last) { norm_rows(n, first, last, FP32); }
EACH_TARGET(KERNEL)

KERNELS

struct job {
    const struct norm *n;
    const struct kernel *kernel;
};

static void run_share(void *data) {
    const struct job *j = data;
    int64_t rank = team_rank(), size = team_size();
    j->kernel->run(j->n, j->n->rows * rank / size, j->n->rows * (rank + 1) / size);
}

/* x (rows, width) and w (width,) → y (rows, width), all of the kernel's dtype. */
void rms_norm(int32_t k, const void *x, const void *w, void *y, int64_t rows, int64_t width, float eps, int32_t threads) {
    struct norm n = {x, w, y, rows, width, eps};
    struct job j = {&n, &kernels[k]};
    if (threads > 1 && parallel && rows > 1) parallel(run_share, &j, (unsigned)threads, 0);
    else kernels[k].run(&n, 0, rows);
}
