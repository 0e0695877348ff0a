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
    return over(w, tile, run, row, more, escapes, q);
}
PLAIN_TILE(avx2, WITH_AVX2, 8, numbers_avx2)

/* In assembly: GCC takes one register for all results, and the destination is an input even where it is zeroed. */
WITH_VBMI2 INLINE __m512i expand_over(__m512i under, __mmask64 mask, __m512i packed) {
    __asm__("vpexpandb %1, %0%{%2%}" : "+v"(under) : "v"(packed), "Yk"(mask));
    return under;
}

/* q + OFFSET of a row of a run, a byte each: pairs looked up, and over those that are "more" the row's half of the escapes of two. */
WITH_VBMI2 INLINE __m512i offset_numbers(__m512i pairs, int row, __m512i two) {
    const __m512i small = _mm512_set1_epi32((int)0x80070908); /* 0 +1 -1 more; the bits above a pair do not matter */
    __m512i v = _mm512_permutexvar_epi8(_mm512_srli_epi16(pairs, 2 * (unsigned)row), small);
    __m512i each = _mm512_and_si512(row % 2 ? _mm512_srli_epi16(two, 4) : two, _mm512_set1_epi8(15));
    return expand_over(v, _mm512_movepi8_mask(v), each);
}

WITH_VBMI2 static const uint8_t *numbers_avx512(const struct nested *w, int64_t tile, int64_t run, int row, const uint8_t *escapes,
                                                int8_t *q) {
    int64_t at = tile * runs_of(w) + run;
    __m512i v;
    if (w->wide) {
        uint64_t mask = ((const uint64_t *)w->pairs)[at * ROWS + row];
        v = expand_over(_mm512_setzero_si512(), mask, _mm512_loadu_si512(escapes));
        escapes += _mm_popcnt_u64(mask);
        _mm512_storeu_si512(q, v);
        return escapes;
    }
    v = offset_numbers(_mm512_loadu_si512(w->pairs + at * RUN), row, _mm512_loadu_si512(escapes));
    _mm512_storeu_si512(q, _mm512_sub_epi8(v, _mm512_set1_epi8(OFFSET)));
    return row % 2 || row == rows_in(w, tile) - 1 ? escapes + w->counts[at * ROWS / 2 + row / 2] : escapes;
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

/* The weights of a row of a run, of w's dtype; the escapes behind it. */
WITH_VBMI2 static const uint8_t *weights_avx512(const struct nested *w, int64_t tile, int64_t run, int row, const uint8_t *escapes,
                                                float step, char *to) {
    int64_t at = tile * runs_of(w) + run;
    int aligned = (uintptr_t)to % LINE == 0; /* whole lines, which whoever multiplies reads from memory as he would a dense weight */
    if (!w->wide && w->stored == BF16 && w->dtype == BF16) {
        __m512i v = offset_numbers(_mm512_loadu_si512(w->pairs + at * RUN), row, _mm512_loadu_si512(escapes));
        __m256i all = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(table_of(step, BF16)), 16));
        __m512i table = _mm512_castsi256_si512(all);
        __m512i low = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(v)), table);
        __m512i high = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(v, 1)), table);
        if (aligned) _mm512_stream_si512((void *)to, low), _mm512_stream_si512((void *)(to + LINE), high);
        else _mm512_storeu_si512(to, low), _mm512_storeu_si512(to + LINE, high);
        return row % 2 || row == rows_in(w, tile) - 1 ? escapes + w->counts[at * ROWS / 2 + row / 2] : escapes;
    }
    int8_t q[RUN];
    escapes = numbers_avx512(w, tile, run, row, escapes, q);
    UNROLL for (int c = 0; c < RUN; c += 16) {
        __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(q + c))));
        v = rounded(_mm512_mul_ps(_mm512_set1_ps(step), v), w->stored);
        if (w->dtype == FP32) _mm512_storeu_ps(to + c * FP32, v);
        else {
            __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(rounded(v, BF16)), 16);
            _mm256_storeu_si256((__m256i *)(to + c * BF16), _mm512_cvtepi32_epi16(bits));
        }
    }
    return escapes;
}

/* A run of x for `avx512`: column 4l + n is number 16n + l, so that the bytes of lane l of numbers, one after the other, are those of
 * column 4l + n of a vector, and a look-up that takes the lowest bits of a lane needs no more than a shift. */
WITH_VBMI2 static void lay_fours(const struct nested *w, const void *x, char *to) {
    float row[RUN], *at = (float *)to;
    for (int64_t r = 0; r < runs_of(w); r++, at += RUN) {
        int64_t some = w->columns - r * RUN < RUN ? w->columns - r * RUN : RUN;
        for (int64_t c = 0; c < RUN; c++) row[c] = c < some ? get(x, r * RUN + c, w->dtype) : 0;
        for (int l = 0; l < 16; l++)
            for (int n = 0; n < 4; n++) at[16 * n + l] = row[4 * l + n];
    }
}

/* For `avx512_bf16`: the even columns of a run, and behind them the odd ones. */
WITH_VBMI2 static void lay_bf16(const struct nested *w, const void *x, char *to) {
    uint16_t *at = (uint16_t *)to;
    for (int64_t r = 0; r < runs_of(w); r++, at += RUN) {
        uint16_t row[RUN] = {0};
        int64_t some = w->columns - r * RUN < RUN ? w->columns - r * RUN : RUN;
        memcpy(row, (const uint16_t *)x + r * RUN, (size_t)some * BF16);
        __m512i low = _mm512_loadu_si512(row), high = _mm512_loadu_si512(row + RUN / 2);
        _mm512_storeu_si512(at, _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1));
        low = _mm512_srli_epi32(low, 16), high = _mm512_srli_epi32(high, 16);
        __m512i odd = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1);
        _mm512_storeu_si512(at + RUN / 2, odd);
    }
}

WITH_VBMI2 INLINE void avx512(TILE, int m) {
    __m512 sum[MOST][ROWS], table[ROWS];
    const uint8_t *escapes = w->escapes + w->starts[tile], *pairs = w->pairs + tile * runs_of(w) * (w->wide ? 8 * ROWS : RUN);
    const uint8_t *counts = w->counts + tile * runs_of(w) * ROWS / 2;
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
        __m512i four = w->wide ? _mm512_setzero_si512() : _mm512_loadu_si512(pairs), two = four;
        _mm_prefetch((const char *)pairs + AHEAD, _MM_HINT_T0), _mm_prefetch((const char *)escapes + AHEAD, _MM_HINT_T0);
        UNROLL for (int i = 0; i < ROWS; i++) {
            __m512i v;
            __m512 a[4];
            if (w->wide) {
                uint64_t mask;
                memcpy(&mask, pairs + 8 * i, 8);
                v = expand_over(_mm512_setzero_si512(), mask, _mm512_loadu_si512(escapes));
                escapes += _mm_popcnt_u64(mask);
                UNROLL for (int n = 0; n < 4; n++) {
                    __m512i each = _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * (unsigned)n), 24);
                    a[n] = rounded(_mm512_mul_ps(table[i], _mm512_cvtepi32_ps(each)), w->stored);
                }
            } else {
                if (i % 2 == 0) two = _mm512_loadu_si512(escapes), escapes += *counts++;
                v = offset_numbers(four, i, two);
                UNROLL for (int n = 0; n < 4; n++) a[n] = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 8 * (unsigned)n), table[i]);
            }
            UNROLL for (int j = 0; j < m; j++)
                UNROLL for (int n = 0; n < 4; n++)
                    sum[j][i] = _mm512_fmadd_ps(a[n], _mm512_loadu_ps(row + j * stride + 16 * n), sum[j][i]);
        }
        pairs += w->wide ? 8 * ROWS : RUN;
    }
    for (int j = 0; j < m; j++) four_sums(sums + j * ROWS, sum[j]);
}
FOR_EACH_M(avx512, WITH_VBMI2)

/* The weights that a q stands for, in bf16, by q + OFFSET. */
WITH_VBMI2 INLINE __m512i half_table(const struct nested *w, int64_t row, int64_t column) {
    __m512i wide = _mm512_castps_si512(table_of(step_of(w, row, column), BF16));
    return _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(wide, 16)));
}

/* The same in bf16, of weights that are stored so: products and sums in fp32. */
WITH_BF16 INLINE void avx512_bf16(TILE, int m) {
    __m512 sum[MOST][ROWS];
    __m512i table[ROWS];
    const uint8_t *escapes = w->escapes + w->starts[tile], *pairs = w->pairs + tile * runs_of(w) * RUN;
    const uint8_t *counts = w->counts + tile * runs_of(w) * ROWS / 2;
    const uint16_t *row = x;
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sum[j][i] = _mm512_setzero_ps();
    for (int64_t r = 0, left = 0; r < runs_of(w); r++, row += RUN, pairs += RUN, left -= RUN) {
        if (left <= 0) {
            left = w->group;
            for (int i = 0; i < ROWS; i++) table[i] = half_table(w, tile * ROWS + i, r * RUN);
        }
        __m512i four = _mm512_loadu_si512(pairs), two = four;
        _mm_prefetch((const char *)pairs + AHEAD, _MM_HINT_T0), _mm_prefetch((const char *)escapes + AHEAD, _MM_HINT_T0);
        UNROLL for (int i = 0; i < ROWS; i++) {
            if (i % 2 == 0) two = _mm512_loadu_si512(escapes), escapes += *counts++;
            __m512i v = offset_numbers(four, i, two); /* the look-up takes the lowest five bits of a word, and numbers have four */
            __m512i even = _mm512_permutexvar_epi16(v, table[i]), odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), table[i]);
            UNROLL for (int j = 0; j < m; j++) {
                sum[j][i] = _mm512_dpbf16_ps(sum[j][i], (__m512bh)even, (__m512bh)_mm512_loadu_si512(row + j * stride));
                sum[j][i] = _mm512_dpbf16_ps(sum[j][i], (__m512bh)odd, (__m512bh)_mm512_loadu_si512(row + j * stride + 32));
            }
        }
    }
    for (int j = 0; j < m; j++) four_sums(sums + j * ROWS, sum[j]);
}
FOR_EACH_M(avx512_bf16, WITH_BF16)

WITH_BF16 static const void *unpack_avx512(const void *weight, int64_t tile, int64_t from, int64_t to, const void *at, uint16_t *out) {
    const struct nested *w = weight;
    const uint8_t *escapes = at ? at : w->escapes + w->starts[tile];
    const uint8_t *pairs = w->pairs + tile * runs_of(w) * RUN + from, *counts = w->counts + (tile * runs_of(w) + from / RUN) * ROWS / 2;
    __m512i table[ROWS];
    int64_t width = to - from;
    for (int64_t c = 0, left = 0; c < width; c += RUN, left -= RUN) {
        if (left <= 0) {
            left = w->group - (from + c) % w->group;
            for (int i = 0; i < ROWS; i++) table[i] = half_table(w, tile * ROWS + i, from + c);
        }
        __m512i four = _mm512_loadu_si512(pairs + c), two = four;
        _mm_prefetch((const char *)pairs + c + AHEAD, _MM_HINT_T0), _mm_prefetch((const char *)escapes + AHEAD, _MM_HINT_T0);
        UNROLL for (int i = 0; i < ROWS; i++) {
            if (i % 2 == 0) two = _mm512_loadu_si512(escapes), escapes += *counts++;
            __m512i v = offset_numbers(four, i, two);
            _mm512_store_si512(out + i * width + c, _mm512_permutexvar_epi16(v, table[i]));
            _mm512_store_si512(out + i * width + c + RUN / 2, _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), table[i]));
        }
    }
    return escapes;
}

static int has_vbmi2(void) {
    return has_avx512f() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2");
}
static int has_bf16(void) { return has_vbmi2() && __builtin_cpu_supports("avx512bf16"); }
