/* The kernels of rows.h for x86-64, each compiled for the instructions it uses and chosen by what the CPU has. */
#include "avx.h"

#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))

TILE_KERNEL(avx2_bf16, WITH_AVX2, __m256, _mm256_setzero_ps(), BF16, sum_of, {
    _mm_prefetch(p + AHEAD, _MM_HINT_T0);
    UNROLL for (int l = 0; l < COLUMNS; l += 8) {
        __m256i half = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(p + l * BF16)));
        __m256 wide = _mm256_castsi256_ps(_mm256_slli_epi32(half, 16));
        UNROLL for (int j = 0; j < m; j++)
            sum[j][u] = _mm256_fmadd_ps(wide, _mm256_loadu_ps((const float *)x[j] + c + l), sum[j][u]);
    }
})

TILE_KERNEL(avx2_fp32, WITH_AVX2, __m256, _mm256_setzero_ps(), FP32, sum_of, {
    _mm_prefetch(p + AHEAD, _MM_HINT_T0), _mm_prefetch(p + AHEAD + 64, _MM_HINT_T0);
    UNROLL for (int l = 0; l < COLUMNS; l += 8) {
        __m256 wide = _mm256_loadu_ps((const float *)(const void *)p + l);
        UNROLL for (int j = 0; j < m; j++)
            sum[j][u] = _mm256_fmadd_ps(wide, _mm256_loadu_ps((const float *)x[j] + c + l), sum[j][u]);
    }
})

TILE_KERNEL(avx512_dot, WITH_BF16, __m512, _mm512_setzero_ps(), BF16, _mm512_reduce_add_ps, {
    _mm_prefetch(p + AHEAD, _MM_HINT_T0);
    __m512bh wide = (__m512bh)_mm512_loadu_si512(p);
    UNROLL for (int j = 0; j < m; j++)
        sum[j][u] = _mm512_dpbf16_ps(sum[j][u], wide, (__m512bh)_mm512_loadu_si512(x[j] + c * BF16));
})

TILE_KERNEL(avx512_bf16, WITH_AVX512F, __m512, _mm512_setzero_ps(), BF16, _mm512_reduce_add_ps, {
    _mm_prefetch(p + AHEAD, _MM_HINT_T0);
    UNROLL for (int l = 0; l < COLUMNS; l += 16) {
        __m512i half = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(p + l * BF16)));
        __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
        UNROLL for (int j = 0; j < m; j++)
            sum[j][u] = _mm512_fmadd_ps(wide, _mm512_loadu_ps((const float *)x[j] + c + l), sum[j][u]);
    }
})

TILE_KERNEL(avx512_fp32, WITH_AVX512F, __m512, _mm512_setzero_ps(), FP32, _mm512_reduce_add_ps, {
    _mm_prefetch(p + AHEAD, _MM_HINT_T0), _mm_prefetch(p + AHEAD + 64, _MM_HINT_T0);
    UNROLL for (int l = 0; l < COLUMNS; l += 16) {
        __m512 wide = _mm512_loadu_ps((const float *)(const void *)p + l);
        UNROLL for (int j = 0; j < m; j++)
            sum[j][u] = _mm512_fmadd_ps(wide, _mm512_loadu_ps((const float *)x[j] + c + l), sum[j][u]);
    }
})

static int has_bf16(void) {
    return has_avx512f() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
}
