/* The kernels of bitmask.c for x86-64, each compiled for the instructions it uses and chosen by what the CPU has. */
#include "avx.h"

#define WITH_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt")))
#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512vbmi2,avx512bf16,popcnt")))

/* Which of the values goes to each place of 8, twice: as bytes to shuffle bf16 by, as lanes to permute fp32 by. */
static uint8_t places[256][8], shuffles[256][16];
__attribute__((constructor)) static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int c = 0, rank = 0; c < 8; c++) {
            int kept = mask >> c & 1;
            places[mask][c] = (uint8_t)(kept ? rank : 0x80);
            shuffles[mask][2 * c] = (uint8_t)(kept ? 2 * rank : 0x80); /* 0x80 gives a zero */
            shuffles[mask][2 * c + 1] = (uint8_t)(kept ? 2 * rank + 1 : 0x80);
            rank += kept;
        }
}

WITH_AVX2 INLINE __m128i eight_bf16(const uint16_t *p, uint32_t mask) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const void *)p), _mm_loadu_si128((const void *)shuffles[mask]));
}
WITH_AVX2 INLINE __m256 eight_fp32(const float *p, uint32_t mask) {
    __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)places[mask]));
    __m256 kept = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), place);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), kept);
}
WITH_AVX2 INLINE __m256 eight_wide(const char *p, uint32_t mask, int dtype) {
    if (dtype == FP32) return eight_fp32((const float *)p, mask);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_bf16((const uint16_t *)p, mask)), 16));
}
WITH_AVX2 INLINE void avx2(TILE, int m, int dtype) {
    const char *p = values;
    __m256 sum[MOST][ROWS];
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sum[j][i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        _mm_prefetch(p + AHEAD, _MM_HINT_T0), _mm_prefetch(p + AHEAD + 64, _MM_HINT_T0);
        UNROLL for (int i = 0; i < ROWS; i++) {
            uint32_t mask = masks[g * ROWS + i];
            UNROLL for (int b = 0; b < 4; b++, mask >>= 8) {
                __m256 w = eight_wide(p, mask & 0xff, dtype);
                p += dtype * __builtin_popcount(mask & 0xff);
                UNROLL for (int j = 0; j < m; j++)
                    sum[j][i] = _mm256_fmadd_ps(w, _mm256_loadu_ps((const float *)x + j * stride + g * COLUMNS + b * 8), sum[j][i]);
            }
        }
    }
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sums[j * ROWS + i] = sum_of(sum[j][i]);
}
WITH_AVX2 INLINE void avx2_bf16(TILE, int m) { avx2(values, masks, x, stride, groups, sums, m, BF16); }
WITH_AVX2 INLINE void avx2_fp32(TILE, int m) { avx2(values, masks, x, stride, groups, sums, m, FP32); }
FOR_EACH_M(avx2_bf16, WITH_AVX2)
FOR_EACH_M(avx2_fp32, WITH_AVX2)
WITH_AVX2 static int64_t avx2_group_bf16(const void *values, uint32_t mask, void *out) {
    const uint16_t *p = values;
    for (int b = 0; b < 4; b++, p += __builtin_popcount(mask & 0xff), mask >>= 8)
        _mm_storeu_si128((__m128i *)out + b, eight_bf16(p, mask & 0xff));
    return p - (const uint16_t *)values;
}
WITH_AVX2 static int64_t avx2_group_fp32(const void *values, uint32_t mask, void *out) {
    const float *p = values;
    for (int b = 0; b < 4; b++, p += __builtin_popcount(mask & 0xff), mask >>= 8)
        _mm256_storeu_ps((float *)out + b * 8, eight_fp32(p, mask & 0xff));
    return p - (const float *)values;
}

/* Expanding in place, in assembly, for two reasons measured on Zen 5: with a memory operand the instruction is
 * microcode (2.7 times as slow), and its destination counts as an input even where it is zeroed, so that a compiler's
 * choice of one register for all results makes a chain of them (6.3 instead of 2.3 cycles for 32 weights). */
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

#define AVX512_TILE(name, target, ELEMENT, X, LINES, ...)                                                 \
    target INLINE void name(TILE, int m) {                                                                \
        const ELEMENT *p = values;                                                                        \
        const X *row = x;                                                                                 \
        __m512 sum[MOST][ROWS];                                                                           \
        for (int j = 0; j < m; j++)                                                                       \
            for (int i = 0; i < ROWS; i++) sum[j][i] = _mm512_setzero_ps();                               \
        for (int64_t g = 0; g < groups; g++, masks += ROWS, row += COLUMNS) {                             \
            for (int l = 0; l < LINES; l++) _mm_prefetch((const char *)p + AHEAD + 64 * l, _MM_HINT_T0);  \
            _mm_prefetch((const char *)masks + AHEAD / 4, _MM_HINT_T0);                                   \
            UNROLL for (int i = 0; i < ROWS; i++) {                                                       \
                uint32_t mask = masks[i];                                                                 \
                __VA_ARGS__                                                                               \
                p += __builtin_popcount(mask);                                                            \
            }                                                                                             \
        }                                                                                                 \
        for (int j = 0; j < m; j++) four_sums(sums + j * ROWS, sum[j]);                                    \
    }                                                                                                     \
    FOR_EACH_M(name, target)

AVX512_TILE(avx512_bf16, WITH_BF16, uint16_t, uint16_t, 2, {
    __m512bh w = (__m512bh)expand_bf16(p, mask);
    UNROLL for (int j = 0; j < m; j++)
        sum[j][i] = _mm512_dpbf16_ps(sum[j][i], w, (__m512bh)_mm512_loadu_si512(row + j * stride));
})

AVX512_TILE(avx512_vbmi2, WITH_VBMI2, uint16_t, float, 2, {
    __m512i w = expand_bf16(p, mask);
    __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(w)), 16));
    __m512 high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(w, 1)), 16));
    UNROLL for (int j = 0; j < m; j++) {
        sum[j][i] = _mm512_fmadd_ps(low, _mm512_loadu_ps(row + j * stride), sum[j][i]);
        sum[j][i] = _mm512_fmadd_ps(high, _mm512_loadu_ps(row + j * stride + 16), sum[j][i]);
    }
})

AVX512_TILE(avx512_fp32, WITH_AVX512F, float, float, 4, {
    __m512 low = expand_fp32(p, mask & 0xffff), high = expand_fp32(p + __builtin_popcount(mask & 0xffff), mask >> 16);
    UNROLL for (int j = 0; j < m; j++) {
        sum[j][i] = _mm512_fmadd_ps(low, _mm512_loadu_ps(row + j * stride), sum[j][i]);
        sum[j][i] = _mm512_fmadd_ps(high, _mm512_loadu_ps(row + j * stride + 16), sum[j][i]);
    }
})

/* Past the cache where alignment allows: the unpacked weight is larger than it (1.3 ms instead of 2.3 at 4096 × 4096). */
WITH_AVX512F INLINE void stream(void *out, __m512i v) {
    if ((uintptr_t)out % 64) _mm512_storeu_si512(out, v);
    else _mm512_stream_si512(out, v);
}
WITH_VBMI2 static int64_t avx512_group_bf16(const void *values, uint32_t mask, void *out) {
    stream(out, expand_bf16(values, mask));
    return __builtin_popcount(mask);
}
WITH_VBMI2 static const void *unpack_avx512(const void *weight, int64_t tile, int64_t from, int64_t to, const void *at, uint16_t *out) {
    const struct weight *w = weight;
    const uint16_t *p = at ? at : (const uint16_t *)w->values + w->starts[tile];
    const uint32_t *masks = w->masks + (tile * groups_of(w) + from / COLUMNS) * ROWS;
    int64_t width = to - from;
    for (int64_t c = 0; c < width; c += COLUMNS, masks += ROWS) {
        _mm_prefetch((const char *)p + AHEAD, _MM_HINT_T0), _mm_prefetch((const char *)p + AHEAD + 64, _MM_HINT_T0);
        UNROLL for (int i = 0; i < ROWS; i++) {
            _mm512_store_si512(out + i * width + c, expand_bf16(p, masks[i]));
            p += __builtin_popcount(masks[i]);
        }
    }
    return p;
}
WITH_AVX512F static int64_t avx512_group_fp32(const void *values, uint32_t mask, void *out) {
    int low = __builtin_popcount(mask & 0xffff);
    stream(out, _mm512_castps_si512(expand_fp32(values, mask & 0xffff)));
    stream((float *)out + 16, _mm512_castps_si512(expand_fp32((const float *)values + low, mask >> 16)));
    return low + __builtin_popcount(mask >> 16);
}
static int has_vbmi2(void) {
    return has_avx512f() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi2");
}
static int has_bf16(void) { return has_vbmi2() && __builtin_cpu_supports("avx512bf16"); }
