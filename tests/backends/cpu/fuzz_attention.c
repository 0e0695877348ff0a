/* Random attention through everything that attention.c exports, every buffer exactly as long as it must be. Built with
 * sanitizers by test_sanitized.py: `fuzz_attention ROUNDS SEED`. Exit 1 where a result is wrong; the sanitizers say the rest. */
#include "attention.c"

#include "fuzz.h"

static struct tensor random_tensor(int64_t batch, int64_t heads, int64_t tokens, int64_t width, int dtype) {
    char *at = buffer(batch * heads * tokens * width, dtype);
    fill(at, batch * heads * tokens * width, dtype);
    return (struct tensor){at, batch, heads, tokens, width, heads * tokens * width, tokens * width, width};
}

/* Element `c` of what query `query` of a head must get. */
static double wanted(const struct attention *a, int64_t batch, int64_t head, int64_t query, int64_t c) {
    int64_t own = head / (a->q.heads / a->k.heads);
    double total = 0, sum = 0;
    for (int64_t t = 0; t < a->k.tokens; t++) {
        double score = 0;
        for (int64_t w = 0; w < a->k.width; w++)
            score += (double)get(row_of(&a->q, batch, head, query, a->dtype), w, a->dtype) * get(row_of(&a->k, batch, own, t, a->dtype), w, a->dtype);
        double weight = a->mask && !a->mask[query * a->k.tokens + t] ? 0 : exp(score * a->scale);
        total += weight, sum += weight * get(row_of(&a->v, batch, own, t, a->dtype), c, a->dtype);
    }
    return total == 0 ? 0 : sum / total;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    state = 88172645463325252ULL + strtoull(arguments[2], NULL, 10);
    use_team(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
    for (long round = 0; round < atol(arguments[1]); round++) {
        int dtype = draw(2) ? FP32 : BF16;
        int64_t batch = 1 + (int64_t)draw(2), heads = 1 + (int64_t)draw(3), shared = 1 + (int64_t)draw(5), queries = 1 + (int64_t)draw(4);
        int64_t keys = 1 + (int64_t)draw(40), width = 1 + (int64_t)draw(140), values = 1 + (int64_t)draw(140);
        struct attention a = {
            .q = random_tensor(batch, heads * shared, queries, width, dtype), .k = random_tensor(batch, heads, keys, width, dtype),
            .v = random_tensor(batch, heads, keys, values, dtype), .dtype = dtype, .scale = 0.1f};
        char *mask = draw(2) ? buffer(queries * keys, 1) : NULL;
        for (int64_t i = 0; mask && i < queries * keys; i++) mask[i] = draw(3) > 0;
        a.mask = mask, a.mask_dtype = 1, a.mask_steps[2] = keys, a.mask_steps[3] = 1;
        int64_t at = (int64_t)draw((uint64_t)batch), head = (int64_t)draw((uint64_t)(heads * shared)), query = (int64_t)draw((uint64_t)queries), c = (int64_t)draw((uint64_t)values);
        double right = wanted(&a, at, head, query, c);
        for (int k = 0; kernel_name(k); k++) {
            if (!kernel_fits(k, dtype)) continue;
            a.y = buffer(batch * queries * heads * shared * values, dtype);
            if (run_attention(&a, k, 1 + (int)draw(4))) return 1;
            double off = fabs(get(a.y, ((at * queries + query) * heads * shared + head) * values + c, dtype) - right);
            if (!(off <= (dtype == BF16 ? fabs(right) / 256 : 0) + 1e-5)) {
                printf("%s is wrong\n", kernel_name(k));
                return 1;
            }
            free(a.y);
        }
        free((void *)a.q.at), free((void *)a.k.at), free((void *)a.v.at), free(mask);
    }
    puts("all right");
    return 0;
}
