/* The kernels of nested.c for x86-64, each compiled for the instructions it uses and chosen by what the CPU has. */
#include "avx.h"

#define WITH_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vbmi2,popcnt")))
#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx512bf16,popcnt")))

WITH_AVX2 static const uint8_t *numbers_avx2(const struct nested *w, int64_t tile, int64_t run, int row, const uint8_t *escapes,
                                              int8_t *q) {
    if (w->wide) return numbers(w, tile, run, row, escapes, q);
    const uint8_t *pairs = w->pairs + (tile * runs_of(w) + run) * RUN;
    const __m256i small = _mm256_set1_epi32(0x00ff0100), three = _mm256_set1_epi8(3);
    uint64_t more = 0;
    for (int h = 0; h < 2; h++) {
        __m256i v = _mm256_loadu_si256((const __m256i *)pairs + h);
        v = _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(2 * row)), three);
        more |= (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, three)) << 32 * h;
        _mm256_storeu_si256((__m256i *)q + h, _mm256_shuffle_epi8(small, v));
    }
    return over(more, escapes, q);
}
PLAIN_TILE(avx2, WITH_AVX2, 8, numbers_avx2)

/* In assembly: GCC takes one register for all results, and the destination is an input even where it is zeroed. */
WITH_VBMI2 INLINE __m512i expand_over(__m512i under, __mmask64 mask, __m512i packed) {
    __asm__("vpexpandb %1, %0%{%2%}" : "+v"(under) : "v"(packed), "Yk"(mask));
    return under;
}

/* q + OFFSET of a row of a run, a byte each: pairs looked up, and over those that are "more" the escapes, spread to bytes. */
WITH_VBMI2 INLINE __m512i offset_numbers(__m512i pairs, int row, const uint8_t **escapes) {
    const __m512i small = _mm512_set1_epi32((int)0x80070908); /* 0 +1 -1 more; the bits above a pair do not matter */
    __m512i v = _mm512_permutexvar_epi8(_mm512_srli_epi16(pairs, 2 * (unsigned)row), small);
    __mmask64 more = _mm512_movepi8_mask(v);
    __m512i two = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)*escapes));
    __m512i each = _mm512_and_si512(_mm512_or_si512(two, _mm512_slli_epi16(two, 4)), _mm512_set1_epi8(15));
    *escapes += (_mm_popcnt_u64(more) + 1) / 2;
    return expand_over(v, more, each);
}

WITH_VBMI2 static const uint8_t *numbers_avx512(const struct nested *w, int64_t tile, int64_t run, int row, const uint8_t *escapes,
                                                int8_t *q) {
    int64_t at = tile * runs_of(w) + run;
    __m512i v;
    if (w->wide) {
        uint64_t mask = ((const uint64_t *)w->pairs)[at * ROWS + row];
        v = expand_over(_mm512_setzero_si512(), mask, _mm512_loadu_si512(escapes));
        escapes += _mm_popcnt_u64(mask);
    } else v = _mm512_sub_epi8(offset_numbers(_mm512_loadu_si512(w->pairs + at * RUN), row, &escapes), _mm512_set1_epi8(OFFSET));
    _mm512_storeu_si512(q, v);
    return escapes;
}

/* steps · q for q from LOWEST to HIGHEST, rounded as it is stored. */
WITH_VBMI2 INLINE __m512 rounded(__m512 v, int stored) {
    if (stored != BF16) return v;
    __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}
WITH_VBMI2 INLINE __m512 table_of(float step, int stored) {
    const __m512i all = _mm512_set_epi32(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    return rounded(_mm512_mul_ps(_mm512_set1_ps(step), _mm512_cvtepi32_ps(all)), stored);
}

#define QUARTER(v, n) ((n) == 0 ? _mm512_castsi512_si128(v) : _mm512_extracti32x4_epi32(v, (n)))

WITH_VBMI2 INLINE void avx512(TILE, int m) {
    __m512 sum[MOST][ROWS], table[ROWS];
    const uint8_t *escapes = w->escapes + w->starts[tile], *pairs = w->pairs + tile * runs_of(w) * (w->wide ? 8 * ROWS : RUN);
    const float *row = x;
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sum[j][i] = _mm512_setzero_ps();
    for (int64_t r = 0, left = 0; r < runs_of(w); r++, row += RUN, left -= RUN) {
        if (left <= 0) { /* a new group of columns */
            left = w->group;
            for (int i = 0; i < ROWS; i++) {
                float step = step_of(w, tile * ROWS + i, r * RUN);
                table[i] = w->wide ? _mm512_set1_ps(step) : table_of(step, w->stored);
            }
        }
        __m512i four = w->wide ? _mm512_setzero_si512() : _mm512_loadu_si512(pairs);
        _mm_prefetch((const char *)pairs + AHEAD, _MM_HINT_T0), _mm_prefetch((const char *)escapes + AHEAD, _MM_HINT_T0);
        UNROLL for (int i = 0; i < ROWS; i++) {
            __m512i v;
            __m512 a[4];
            if (w->wide) {
                uint64_t mask;
                memcpy(&mask, pairs + 8 * i, 8);
                v = expand_over(_mm512_setzero_si512(), mask, _mm512_loadu_si512(escapes));
                escapes += _mm_popcnt_u64(mask);
                a[0] = rounded(_mm512_mul_ps(table[i], _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(QUARTER(v, 0)))), w->stored);
                a[1] = rounded(_mm512_mul_ps(table[i], _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(QUARTER(v, 1)))), w->stored);
                a[2] = rounded(_mm512_mul_ps(table[i], _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(QUARTER(v, 2)))), w->stored);
                a[3] = rounded(_mm512_mul_ps(table[i], _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(QUARTER(v, 3)))), w->stored);
            } else {
                v = offset_numbers(four, i, &escapes);
                a[0] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(QUARTER(v, 0)), table[i]);
                a[1] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(QUARTER(v, 1)), table[i]);
                a[2] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(QUARTER(v, 2)), table[i]);
                a[3] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(QUARTER(v, 3)), table[i]);
            }
            UNROLL for (int j = 0; j < m; j++)
                UNROLL for (int n = 0; n < 4; n++)
                    sum[j][i] = _mm512_fmadd_ps(a[n], _mm512_loadu_ps(row + j * stride + 16 * n), sum[j][i]);
        }
        pairs += w->wide ? 8 * ROWS : RUN;
    }
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sums[j * ROWS + i] = _mm512_reduce_add_ps(sum[j][i]);
}
FOR_EACH_M(avx512, WITH_VBMI2)

/* The same in bf16, of weights that are stored so: products and sums in fp32. */
WITH_BF16 INLINE void avx512_bf16(TILE, int m) {
    __m512 sum[MOST][ROWS];
    __m512i table[ROWS];
    const uint8_t *escapes = w->escapes + w->starts[tile], *pairs = w->pairs + tile * runs_of(w) * RUN;
    const uint16_t *row = x;
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sum[j][i] = _mm512_setzero_ps();
    for (int64_t r = 0, left = 0; r < runs_of(w); r++, row += RUN, pairs += RUN, left -= RUN) {
        if (left <= 0) {
            left = w->group;
            for (int i = 0; i < ROWS; i++) {
                __m512i wide = _mm512_castps_si512(table_of(step_of(w, tile * ROWS + i, r * RUN), BF16));
                table[i] = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(wide, 16)));
            }
        }
        __m512i four = _mm512_loadu_si512(pairs);
        _mm_prefetch((const char *)pairs + AHEAD, _MM_HINT_T0), _mm_prefetch((const char *)escapes + AHEAD, _MM_HINT_T0);
        UNROLL for (int i = 0; i < ROWS; i++) {
            __m512i v = offset_numbers(four, i, &escapes);
            __m512i low = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(v)), table[i]);
            __m512i high = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(v, 1)), table[i]);
            UNROLL for (int j = 0; j < m; j++) {
                sum[j][i] = _mm512_dpbf16_ps(sum[j][i], (__m512bh)low, (__m512bh)_mm512_loadu_si512(row + j * stride));
                sum[j][i] = _mm512_dpbf16_ps(sum[j][i], (__m512bh)high, (__m512bh)_mm512_loadu_si512(row + j * stride + 32));
            }
        }
    }
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sums[j * ROWS + i] = _mm512_reduce_add_ps(sum[j][i]);
}
FOR_EACH_M(avx512_bf16, WITH_BF16)

static int has_vbmi2(void) {
    return has_avx512f() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2");
}
static int has_bf16(void) { return has_vbmi2() && __builtin_cpu_supports("avx512bf16"); }
