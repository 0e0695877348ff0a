/* Products with activations of 8 bits, for the kernels of nested.c that are named so. A token is cut into spans of columns, x ≈ scale · k
 * with a scale for each span and whole numbers k from -127 to 127; Σ q · k of a span is exact in int32, and W = steps · q is not rounded.
 *
 * A record holds a token: the scales of its spans, up to a whole line; then, span by span, `behind` (16 int32) and k (int8, 0 behind the last
 * column). Numbers are multiplied as unsigned ones, q + offset: lane l of `behind` is what that adds to columns 4l … 4l + 3 of every run,
 * with its sign turned.
 */
enum { SPAN = 4 * RUN, LINE = 64, WIDE_OFFSET = 128 };

static int64_t span_of(const struct nested *w) { return w->group % SPAN == 0 || w->group >= w->columns ? SPAN : RUN; }
static int64_t spans_of(const struct nested *w) { return (w->columns + span_of(w) - 1) / span_of(w); }
static int64_t scales_size(const struct nested *w) { return (spans_of(w) * (int64_t)sizeof(float) + LINE - 1) / LINE * LINE; }
static int64_t record_size(const struct nested *w) { return scales_size(w) + spans_of(w) * (LINE + span_of(w)); }

/* Written so that it becomes vectors. What is not finite makes the scale NaN, and with it every sum. */
#define RECORD(name, target)                                                                                             \
    target static void name(const struct nested *w, const void *x, char *record) {                                       \
        int64_t span = span_of(w);                                                                                       \
        int offset = w->wide ? WIDE_OFFSET : OFFSET;                                                                     \
        float *scales = (float *)record;                                                                                 \
        char *at = record + scales_size(w);                                                                              \
        for (int64_t s = 0; s < spans_of(w); s++, at += LINE + span) {                                                   \
            float v[SPAN] = {0};                                                                                         \
            int32_t largest = 0, behind[LINE / 4] = {0};                                                                 \
            int8_t *k = (int8_t *)at + LINE;                                                                             \
            int64_t first = s * span, some = w->columns - first < span ? w->columns - first : span;                      \
            if (w->dtype == FP32) memcpy(v, (const float *)x + first, (size_t)some * sizeof *v);                         \
            else for (int64_t c = 0; c < some; c++) v[c] = widen(((const uint16_t *)x)[first + c]);                      \
            for (int c = 0; c < SPAN; c++) {                                                                             \
                int32_t bits;                                                                                            \
                memcpy(&bits, v + c, sizeof bits);                                                                       \
                bits &= 0x7fffffff; /* of numbers without a sign, bits are in order as the numbers are */                \
                largest = bits > largest ? bits : largest;                                                               \
            }                                                                                                            \
            int finite = largest < 0x7f800000;                                                                           \
            float most, inverse;                                                                                         \
            memcpy(&most, &largest, sizeof most);                                                                        \
            scales[s] = finite ? most / 127 : NAN;                                                                       \
            inverse = finite && scales[s] > 1e-37f ? 1 / scales[s] : 0;                                                  \
            for (int c = 0; c < span; c++) {                                                                             \
                float t = v[c] * inverse;                                                                                \
                k[c] = (int8_t)(int32_t)(t + (t < 0 ? -0.5f : 0.5f));                                                    \
            }                                                                                                            \
            for (int64_t r = 0; r < span; r += RUN)                                                                      \
                for (int l = 0; l < LINE / 4; l++)                                                                       \
                    behind[l] -= offset * (k[r + 4 * l] + k[r + 4 * l + 1] + k[r + 4 * l + 2] + k[r + 4 * l + 3]);       \
            memcpy(at, behind, sizeof behind);                                                                           \
        }                                                                                                                \
    }

RECORD(record_portable, )
INLINE void int8_portable(TILE, int m) {
    const uint8_t *escapes = w->escapes + w->starts[tile];
    int64_t rows = rows_in(w, tile), span = span_of(w);
    memset(sums, 0, (size_t)m * ROWS * sizeof *sums);
    for (int64_t s = 0, r = 0; s < spans_of(w); s++) {
        int32_t dots[MOST][ROWS] = {{0}};
        int64_t at = scales_size(w) + s * (LINE + span) + LINE, end = (s + 1) * span / RUN;
        float step[ROWS];
        for (int i = 0; i < rows; i++) step[i] = step_of(w, tile * ROWS + i, s * span);
        for (; r < end && r < runs_of(w); r++, at += RUN)
            for (int i = 0; i < rows; i++) {
                int8_t q[RUN];
                escapes = numbers(w, tile, r, i, escapes, q);
                for (int j = 0; j < m; j++) {
                    const int8_t *k = (const int8_t *)x + j * stride + at;
                    for (int c = 0; c < RUN; c++) dots[j][i] += q[c] * k[c];
                }
            }
        for (int j = 0; j < m; j++)
            for (int i = 0; i < rows; i++)
                sums[j * ROWS + i] += (float)dots[j][i] * (step[i] * ((const float *)((const char *)x + j * stride))[s]);
    }
}
FOR_EACH_M(int8_portable, )
