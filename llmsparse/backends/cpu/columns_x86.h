/* The kernels of columns.c for x86-64, each compiled for the instructions it uses and chosen by what the CPU has.
 *
 * bf16 is widened two rows at a time: the even rows are shifted up, of the odd ones the lower half is cleared, and sums lie in that
 * order. A column is prefetched while the one before it, four back, is read: the hardware sees no stream in so short a run.
 */
#include "avx.h"

#define WITH_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt")))

#define AVX512_PASS(name, target, BYTES, EVERY, ...)                                                               \
    target INLINE void name(PASS, int m) {                                                                         \
        const char *p[FOUR];                                                                                       \
        const uint32_t *masks[FOUR];                                                                               \
        int64_t ahead[FOUR], next_masks[FOUR]; /* all of it copied: what is written to sums could be any of these to the compiler */ \
        __m512 x[MOST][FOUR];                                                                                      \
        UNROLL for (int i = 0; i < FOUR; i++) {                                                                    \
            p[i] = c->values[i], masks[i] = c->masks[i], ahead[i] = c->next[i] - c->values[i];                     \
            next_masks[i] = c->next_masks[i] - c->masks[i];                                                        \
            for (int j = 0; j < m; j++) x[j][i] = _mm512_set1_ps(c->x[i][j]);                                      \
        }                                                                                                          \
        for (int64_t g = 0; g < groups; g++) {                                                                     \
            float *to = sums + g * GROUP;                                                                          \
            __m512 low[MOST], high[MOST];                                                                          \
            if ((EVERY) > 1 && g % 16 == 0)                                                                        \
                UNROLL for (int i = 0; i < FOUR; i++) _mm_prefetch((const char *)(masks[i] + next_masks[i] + g), _MM_HINT_T0); \
            if (g % (EVERY) == 0)                                                                                  \
                UNROLL for (int i = 0; i < FOUR; i++)                                                              \
                    UNROLL for (int l = 0; l < (BYTES) / 2; l++) _mm_prefetch(p[i] + ahead[i] + 64 * l, _MM_HINT_T0); \
            UNROLL for (int j = 0; j < m; j++)                                                                     \
                low[j] = _mm512_load_ps(to + j * stride), high[j] = _mm512_load_ps(to + j * stride + 16);          \
            UNROLL for (int i = 0; i < FOUR; i++) {                                                                \
                __m512 one, other;                                                                                 \
                __VA_ARGS__                                                                                        \
                UNROLL for (int j = 0; j < m; j++)                                                                 \
                    low[j] = _mm512_fmadd_ps(one, x[j][i], low[j]), high[j] = _mm512_fmadd_ps(other, x[j][i], high[j]); \
            }                                                                                                      \
            UNROLL for (int j = 0; j < m; j++)                                                                     \
                _mm512_store_ps(to + j * stride, low[j]), _mm512_store_ps(to + j * stride + 16, high[j]);          \
        }                                                                                                          \
        (void)masks, (void)next_masks;                                                                                               \
    }                                                                                                              \
    FOR_EACH_M(name, target)

/* In place, in assembly: see x86.h. */
WITH_VBMI2 INLINE __m512i expand_bf16(const void *p, uint32_t mask) {
    __m512i v = _mm512_loadu_si512(p);
    __asm__("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"((__mmask32)mask));
    return v;
}
WITH_AVX512F INLINE __m512 expand_fp32(const void *p, uint32_t mask) {
    __m512 v = _mm512_loadu_ps(p);
    __asm__("vexpandps %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"((__mmask16)mask));
    return v;
}

#define WIDEN(v)                                                                   \
    one = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));                           \
    other = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));

AVX512_PASS(avx512_bf16, WITH_AVX512F, BF16, 1, {
    __m512i v = _mm512_loadu_si512(p[i]);
    WIDEN(v)
    p[i] += GROUP * BF16;
})
AVX512_PASS(avx512_fp32, WITH_AVX512F, FP32, 1, {
    one = _mm512_loadu_ps(p[i]), other = _mm512_loadu_ps(p[i] + 64);
    p[i] += GROUP * FP32;
})
AVX512_PASS(vbmi2_bf16, WITH_VBMI2, BF16, 2, {
    uint32_t mask = masks[i][g];
    __m512i v = expand_bf16(p[i], mask);
    WIDEN(v)
    p[i] += __builtin_popcount(mask) * BF16;
})
AVX512_PASS(avx512_packed_fp32, WITH_AVX512F, FP32, 1, {
    uint32_t mask = masks[i][g];
    int first = __builtin_popcount(mask & 0xffff);
    one = expand_fp32(p[i], mask & 0xffff), other = expand_fp32(p[i] + first * FP32, mask >> 16);
    p[i] += (first + __builtin_popcount(mask >> 16)) * FP32;
})

#define AVX2_PASS(name, BYTES, ...)                                                                                  \
    WITH_AVX2 INLINE void name(PASS, int m) {                                                                        \
        for (int64_t g = 0; g < groups * GROUP; g += 16) {                                                           \
            float *to = sums + g;                                                                                    \
            __m256 low[MOST], high[MOST];                                                                            \
            UNROLL for (int j = 0; j < m; j++)                                                                       \
                low[j] = _mm256_load_ps(to + j * stride), high[j] = _mm256_load_ps(to + j * stride + 8);             \
            UNROLL for (int i = 0; i < FOUR; i++) {                                                                  \
                __m256 one, other;                                                                                   \
                const char *p = c->values[i] + g * (BYTES);                                                          \
                _mm_prefetch(c->next[i] + g * (BYTES), _MM_HINT_T0);                                                 \
                __VA_ARGS__                                                                                          \
                UNROLL for (int j = 0; j < m; j++) {                                                                 \
                    __m256 x = _mm256_set1_ps(c->x[i][j]);                                                           \
                    low[j] = _mm256_fmadd_ps(one, x, low[j]), high[j] = _mm256_fmadd_ps(other, x, high[j]);          \
                }                                                                                                    \
            }                                                                                                        \
            UNROLL for (int j = 0; j < m; j++)                                                                       \
                _mm256_store_ps(to + j * stride, low[j]), _mm256_store_ps(to + j * stride + 8, high[j]);             \
        }                                                                                                            \
    }                                                                                                                \
    FOR_EACH_M(name, WITH_AVX2)

AVX2_PASS(avx2_bf16, BF16, {
    __m256i v = _mm256_loadu_si256((const void *)p);
    one = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    other = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000)));
})
AVX2_PASS(avx2_fp32, FP32, { one = _mm256_loadu_ps((const void *)p), other = _mm256_loadu_ps((const void *)(p + 32)); })

WITH_VBMI2 static void vbmi2_group_bf16(const void *values, uint32_t mask, void *out) {
    _mm512_storeu_si512(out, expand_bf16(values, mask));
}
WITH_AVX512F static void avx512_group_fp32(const void *values, uint32_t mask, void *out) {
    int first = __builtin_popcount(mask & 0xffff);
    _mm512_storeu_ps(out, expand_fp32(values, mask & 0xffff));
    _mm512_storeu_ps((float *)out + 16, expand_fp32((const float *)values + first, mask >> 16));
}
static int has_vbmi2(void) {
    return has_avx512f() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi2");
}
