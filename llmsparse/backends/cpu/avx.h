/* What kernels for x86-64 share: the instructions that each is compiled for, and whether this CPU has them. */
#include <immintrin.h>

#define WITH_AVX2 __attribute__((target("avx2,fma,popcnt")))
#define WITH_AVX512F __attribute__((target("avx512f,popcnt")))

WITH_AVX2 INLINE float sum_of(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}
static int has_avx512f(void) { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("popcnt"); }
