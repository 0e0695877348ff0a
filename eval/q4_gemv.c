/* The rival of eval/nested_speed.py: y = x · Wᵀ with W in 4 bits, 32 columns of a row sharing a scale in fp16, as in llama.cpp's Q4_0,
 * repacked for AVX-512 VNNI: 16 rows side by side, one a lane. x becomes int8 with a scale for every 256 columns, where Q4_0 has one for
 * every 32, so this is a little cheaper than llama.cpp's own loop.
 */
#include "../llmsparse/backends/cpu/floats.h"
#include "../llmsparse/backends/cpu/team.h"

#include <immintrin.h>
#include <stdlib.h>

enum { BLOCK = 32, SIDE = 16, GROUP = 256, MIDDLE = 8 };

#define WITH_VNNI __attribute__((target("avx512f,avx512bw,avx512vnni,f16c")))

struct product {
    const uint8_t *values;  /* (rows / 16, columns / 32) blocks of 256 bytes: 4 times 16 rows of 4 bytes, a byte two columns 4 apart */
    const uint16_t *scales; /* fp16 (rows / 16, columns / 32, 16) */
    const int8_t *k;        /* (columns,) */
    const float *x_scales;  /* (columns / 256,) */
    const int32_t *behind;  /* (columns / 32,) -8 · the sum of k */
    uint16_t *y;
    int64_t rows, columns;
};

int32_t q4_runs_here(void) { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"); }

WITH_VNNI static void member(void *data) {
    const struct product *p = data;
    const __m512i nibble = _mm512_set1_epi8(15);
    int64_t sides = p->rows / SIDE, rank = parallel ? team_rank() : 0, size = parallel ? team_size() : 1, blocks = p->columns / BLOCK;
    for (int64_t t = sides * rank / size; t < sides * (rank + 1) / size; t++) {
        const uint8_t *v = p->values + t * blocks * 256;
        const uint16_t *s = p->scales + t * blocks * SIDE;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t b = 0; b < blocks; b++, v += 256, s += SIDE) {
            __m512i even = _mm512_set1_epi32(p->behind[b]), odd = _mm512_setzero_si512();
            _mm_prefetch((const char *)s + 1024, _MM_HINT_T0);
            UNROLL for (int l = 0; l < 4; l++) {
                int32_t x[2];
                memcpy(x, p->k + b * BLOCK + l * 8, 8);
                __m512i both = _mm512_loadu_si512(v + l * 64);
                _mm_prefetch((const char *)v + l * 64 + 8192, _MM_HINT_T0);
                even = _mm512_dpbusd_epi32(even, _mm512_and_si512(both, nibble), _mm512_set1_epi32(x[0]));
                odd = _mm512_dpbusd_epi32(odd, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble), _mm512_set1_epi32(x[1]));
            }
            __m512 scale = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const void *)s)), _mm512_set1_ps(p->x_scales[b * BLOCK / GROUP]));
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), scale, sum);
        }
        float y[SIDE];
        _mm512_storeu_ps(y, sum);
        for (int i = 0; i < SIDE; i++) p->y[t * SIDE + i] = narrow(y[i]);
    }
}

/* x (columns,) and y (rows,) bf16; rows a multiple of 16, columns of 256. */
WITH_VNNI int32_t q4_matvec(const uint8_t *values, const uint16_t *scales, const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns,
                            int32_t threads) {
    int8_t *k = malloc((size_t)columns);
    float *x_scales = malloc((size_t)(columns / GROUP) * sizeof *x_scales);
    int32_t *behind = calloc((size_t)(columns / BLOCK), sizeof *behind);
    struct product p = {values, scales, k, x_scales, behind, y, rows, columns};
    if (!k || !x_scales || !behind) return -1;
    for (int64_t g = 0; g < columns / GROUP; g++) {
        int32_t largest = 0;
        float most;
        for (int64_t c = g * GROUP; c < (g + 1) * GROUP; c++) largest = (x[c] & 0x7fff) > largest ? x[c] & 0x7fff : largest;
        most = widen((uint16_t)largest), x_scales[g] = most / 127;
        for (int64_t c = g * GROUP; c < (g + 1) * GROUP; c++) {
            float t = most > 0 ? widen(x[c]) * (127 / most) : 0;
            k[c] = (int8_t)(int32_t)(t + (t < 0 ? -0.5f : 0.5f));
            behind[c / BLOCK] -= MIDDLE * k[c];
        }
    }
    if (parallel) parallel(member, &p, (unsigned)threads, 0);
    else member(&p);
    free(k), free(x_scales), free(behind);
    return 0;
}
