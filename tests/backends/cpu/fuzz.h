/* What the fuzzers share: random numbers, and buffers exactly as long as they must be. */
#include <math.h>
#include <omp.h>
#include <stdio.h>

void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);

static uint64_t state;
static uint64_t draw(uint64_t below) { /* xorshift64 */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % below;
}

static void *buffer(int64_t elements, int64_t size) {
    char *bytes = malloc((size_t)(elements * size)); /* of 0 bytes too: reading one of them is then an error */
    for (int64_t b = 0; b < elements * size; b++) bytes[b] = (char)0xff; /* NaN, or a mask of ones */
    return bytes;
}

static void fill(void *p, int64_t elements, int dtype) {
    for (int64_t i = 0; i < elements; i++) put(p, i, dtype, (float)draw(2001) / 1000 - 1);
}
