/* The kernels of nested_int8.h for x86-64. */
#define WITH_VNNI __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")))

RECORD(record_avx512, WITH_VNNI)

/* Of a tile, in the order of its streams: a run is four rows by one load of pairs, and a span is summed in integers. */
WITH_VNNI INLINE void avx512_vnni_of(TILE, int m, int wide) {
    __m512 sum[MOST][ROWS], part[MOST][ROWS];
    const __m512i flip = _mm512_set1_epi8((char)WIDE_OFFSET);
    const uint8_t *escapes = w->escapes + w->starts[tile], *pairs = w->pairs + tile * runs_of(w) * (wide ? 8 * ROWS : RUN);
    const uint8_t *counts = w->counts + tile * runs_of(w) * ROWS / 2;
    int64_t span = span_of(w), runs = runs_of(w), left = w->group;
    const char *at = (const char *)x + scales_size(w);
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sum[j][i] = part[j][i] = _mm512_setzero_ps();
    for (int64_t s = 0; s < spans_of(w); s++, at += LINE + span) {
        __m512i dots[MOST][ROWS];
        int64_t here = runs < span / RUN ? runs : span / RUN;
        runs -= here;
        for (int j = 0; j < m; j++)
            UNROLL for (int i = 0; i < ROWS; i++) dots[j][i] = _mm512_loadu_si512(at + j * stride);
        for (const char *k = at + LINE; here; here--, k += RUN) {
            __m512i four = wide ? _mm512_setzero_si512() : _mm512_loadu_si512(pairs), two = four;
            _mm_prefetch((const char *)pairs + AHEAD, _MM_HINT_T0), _mm_prefetch((const char *)escapes + AHEAD, _MM_HINT_T0);
            UNROLL for (int i = 0; i < ROWS; i++) {
                __m512i v;
                if (wide) {
                    uint64_t mask;
                    memcpy(&mask, pairs + 8 * i, 8);
                    v = _mm512_xor_si512(expand_over(_mm512_setzero_si512(), mask, _mm512_loadu_si512(escapes)), flip);
                    escapes += _mm_popcnt_u64(mask);
                } else {
                    if (i % 2 == 0) two = _mm512_loadu_si512(escapes), escapes += *counts++;
                    v = offset_numbers(four, i, two);
                }
                UNROLL for (int j = 0; j < m; j++) dots[j][i] = _mm512_dpbusd_epi32(dots[j][i], v, _mm512_loadu_si512(k + j * stride));
            }
            pairs += wide ? 8 * ROWS : RUN;
        }
        left -= span;
        for (int j = 0; j < m; j++) {
            __m512 scale = _mm512_set1_ps(((const float *)((const char *)x + j * stride))[s]);
            UNROLL for (int i = 0; i < ROWS; i++) part[j][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[j][i]), scale, part[j][i]);
        }
        if (left > 0 && s < spans_of(w) - 1) continue; /* the columns that share a step go on */
        left = w->group;
        UNROLL for (int i = 0; i < ROWS; i++) {
            __m512 step = _mm512_set1_ps(step_of(w, tile * ROWS + i, s * span));
            for (int j = 0; j < m; j++) {
                sum[j][i] = _mm512_fmadd_ps(part[j][i], step, sum[j][i]);
                part[j][i] = _mm512_setzero_ps();
            }
        }
    }
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sums[j * ROWS + i] = _mm512_reduce_add_ps(sum[j][i]);
}
WITH_VNNI INLINE void avx512_vnni(TILE, int m) {
    if (w->wide) avx512_vnni_of(w, tile, x, stride, sums, m, 1);
    else avx512_vnni_of(w, tile, x, stride, sums, m, 0);
}
FOR_EACH_M(avx512_vnni, WITH_VNNI)

/* AVX2 multiplies unsigned bytes with signed ones, too, and sums two in 16 bits, which 2 · 15 · 127 does not fill: not for wide weights. */
RECORD(record_avx2, WITH_AVX2)
WITH_AVX2 INLINE void int8_avx2(TILE, int m) {
    __m256 sum[MOST][ROWS];
    const __m256i ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi8(OFFSET);
    const uint8_t *escapes = w->escapes + w->starts[tile];
    int64_t span = span_of(w), r = 0, rows = rows_in(w, tile);
    const char *at = (const char *)x + scales_size(w);
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sum[j][i] = _mm256_setzero_ps();
    for (int64_t s = 0; s < spans_of(w); s++, at += LINE + span) {
        __m256i dots[MOST][ROWS];
        int64_t end = (s + 1) * span / RUN < runs_of(w) ? (s + 1) * span / RUN : runs_of(w);
        for (int j = 0; j < m; j++) {
            const __m256i *behind = (const __m256i *)(at + j * stride);
            for (int i = 0; i < ROWS; i++) dots[j][i] = _mm256_add_epi32(_mm256_loadu_si256(behind), _mm256_loadu_si256(behind + 1));
        }
        for (const char *k = at + LINE; r < end; r++, k += RUN)
            for (int i = 0; i < rows; i++) {
                int8_t q[RUN];
                escapes = numbers_avx2(w, tile, r, i, escapes, q);
                for (int h = 0; h < 2; h++) {
                    __m256i v = _mm256_add_epi8(_mm256_loadu_si256((const __m256i *)q + h), offset);
                    for (int j = 0; j < m; j++) {
                        __m256i two = _mm256_maddubs_epi16(v, _mm256_loadu_si256((const __m256i *)(k + j * stride) + h));
                        dots[j][i] = _mm256_add_epi32(dots[j][i], _mm256_madd_epi16(two, ones));
                    }
                }
            }
        for (int i = 0; i < rows; i++) {
            float step = step_of(w, tile * ROWS + i, s * span);
            for (int j = 0; j < m; j++) {
                __m256 scale = _mm256_set1_ps(step * ((const float *)((const char *)x + j * stride))[s]);
                sum[j][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[j][i]), scale, sum[j][i]);
            }
        }
    }
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++) sums[j * ROWS + i] = sum_of(sum[j][i]);
}
FOR_EACH_M(int8_avx2, WITH_AVX2)

static int has_vnni(void) { return has_vbmi2() && __builtin_cpu_supports("avx512vnni"); }
