/* Many tokens at once, in bf16: a few tiles are unpacked, a band of columns at a time that stays in the cache, and multiplied with
 * all tokens. Every sum is made in the order of the kernels for few tokens: a token has the same bits alone and among others. */
#include <stdlib.h>

enum { FEWEST = 3 };  /* tokens in one pass over a tile, as `pass_of` shares them out */
enum { TOKENS = 6 };  /* at most: TOKENS · ROWS sums, and what they are made of, fill the registers */
_Static_assert(FEW + 1 >= FEWEST, "so few are multiplied in another way");
#ifndef BAND
#define BAND 8192 /* columns at most: what it costs to put sums aside is more than what reading from the second cache costs */
#endif
enum { TILES = 4 };   /* unpacked at a time, so that x is read once for all of them */
enum { GROUP = 64 };  /* columns that are unpacked together, in any layout */
enum { LANES = 64 };  /* bytes of a vector of sums */

/* Columns `from` to `to` of a tile's ROWS rows → out (ROWS, to - from), laid out as x is. `at` is what the last call for the tile gave,
 * NULL for its first. */
typedef const void *unpack_kernel(const void *w, int64_t tile, int64_t from, int64_t to, const void *at, uint16_t *out);
/* Sums (m, TILES * ROWS) of rows of x from `from` on and `tiles` tiles are all there. */
typedef void finish_sums(const void *job, int64_t which, int64_t tile, int64_t tiles, int32_t from, int32_t m, const float *sums);

struct many {
    unpack_kernel *unpack;
    finish_sums *finish;
    const void *job;   /* of `finish` */
    const uint16_t *x; /* (m, columns) */
    int64_t columns;   /* filled up to whole groups */
    int32_t m;
};

/* Columns of a band. */
static int64_t band_of(int64_t columns) {
    int64_t bands = (columns + BAND - 1) / BAND, each = bands ? (columns + bands - 1) / bands : 0;
    return (each + GROUP - 1) / GROUP * GROUP;
}

/* What a thread needs: a band (TILES, ROWS, columns), and the sums (m, TILES, ROWS) where there are several. */
static int64_t room_for_many(int64_t columns, int32_t m) {
    return TILES * ROWS * (band_of(columns) * BF16 + (columns > BAND ? m * LANES : 0));
}

#if X86

struct step {
    const uint16_t *band, *x;
    char *kept; /* sums (M, TILES, ROWS) of the bands before this one, and to go on with */
    int64_t width, stride;
    int begins, ends; /* whether it is the first band, and the last */
};

WITH_BF16 INLINE void step(const struct step *s, float *sums, int m) {
    __m512 sum[TOKENS][ROWS];
    for (int j = 0; j < m; j++)
        for (int i = 0; i < ROWS; i++)
            sum[j][i] = s->begins ? _mm512_setzero_ps() : _mm512_load_ps(s->kept + (j * TILES * ROWS + i) * LANES);
    for (int64_t c = 0; c < s->width; c += 32) {
        __m512bh w[ROWS];
        for (int i = 0; i < ROWS; i++) w[i] = (__m512bh)_mm512_load_si512(s->band + i * s->width + c);
        for (int j = 0; j < m; j++) {
            __m512bh x = (__m512bh)_mm512_loadu_si512(s->x + j * s->stride + c);
            for (int i = 0; i < ROWS; i++) sum[j][i] = _mm512_dpbf16_ps(sum[j][i], w[i], x);
        }
    }
    for (int j = 0; j < m; j++) {
        if (s->ends) four_sums(sums + j * TILES * ROWS, sum[j]);
        else
            for (int i = 0; i < ROWS; i++) _mm512_store_ps(s->kept + (j * TILES * ROWS + i) * LANES, sum[j][i]);
    }
}
WITH_BF16 static void step_3(const struct step *s, float *sums) { step(s, sums, 3); }
WITH_BF16 static void step_4(const struct step *s, float *sums) { step(s, sums, 4); }
WITH_BF16 static void step_5(const struct step *s, float *sums) { step(s, sums, 5); }
WITH_BF16 static void step_6(const struct step *s, float *sums) { step(s, sums, 6); }
static void (*const steps[TOKENS - FEWEST + 1])(const struct step *, float *) = {step_3, step_4, step_5, step_6};

/* Rows of x in the next pass, of those that are left: six, and no one or two after them. */
static int32_t pass_of(int32_t left) { return left >= 2 * TOKENS || left <= TOKENS ? left < TOKENS ? left : TOKENS : (left + 1) / 2; }

/* Tiles `first` to `last` of weight w, which is number `which`. */
static void multiply_many(const struct many *p, const void *w, int64_t which, int64_t first, int64_t last, char *room) {
    uint16_t *band = (uint16_t *)room;
    int64_t most = band_of(p->columns);
    char *kept = room + TILES * ROWS * most * BF16;
    for (int64_t tile = first; tile < last; tile += TILES) {
        int64_t tiles = last - tile < TILES ? last - tile : TILES;
        const void *at[TILES] = {NULL};
        for (int64_t from = 0; from < p->columns; from += most) {
            int64_t to = from + most < p->columns ? from + most : p->columns, width = to - from;
            for (int64_t t = 0; t < tiles; t++) at[t] = p->unpack(w, tile + t, from, to, at[t], band + t * ROWS * width);
            for (int32_t done = 0; done < p->m; done += pass_of(p->m - done)) {
                float sums[TOKENS * TILES * ROWS];
                int32_t m = pass_of(p->m - done);
                for (int64_t t = 0; t < tiles; t++) {
                    struct step s = {band + t * ROWS * width, p->x + done * p->columns + from, NULL, width, p->columns, !from,
                                     to == p->columns};
                    if (most < p->columns) s.kept = kept + (done * TILES + t) * ROWS * LANES;
                    steps[m - FEWEST](&s, sums + t * ROWS);
                }
                if (to == p->columns) p->finish(p->job, which, tile, tiles, done, m, sums);
            }
        }
    }
}
#endif
