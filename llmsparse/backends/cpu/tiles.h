/* How a weight lies in memory for the kernels, how its tiles are shared out to threads, and the way from the neutral
 * format and back. */
#include <stdlib.h>

#include "floats.h"
#include "team.h"

enum { ROWS = 4, COLUMNS = 32, SLACK = 32 };
enum { WORD_COST = 12 }; /* a mask word takes as long as 12 values, on Zen 5 */

struct weight {
    void *values;          /* (nnz + SLACK,) bf16 or fp32 */
    uint32_t *masks;       /* (tiles, groups, ROWS), bit c of a word is column c of the group; rows behind the last are 0 */
    const int64_t *starts; /* (tiles + 1,) first value of every tile */
    int64_t rows, columns;
    int32_t dtype;
};

static int64_t tiles_of(const struct weight *w) { return (w->rows + ROWS - 1) / ROWS; }
static int64_t groups_of(const struct weight *w) { return (w->columns + COLUMNS - 1) / COLUMNS; }
static int64_t rows_of(const struct weight *w, int64_t tile) {
    int64_t left = w->rows - tile * ROWS;
    return left < ROWS ? left : ROWS;
}

/* What the tiles before this one cost. */
static double cost_before(const struct weight *w, int64_t tile) {
    return (double)(w->starts[tile] - w->starts[0]) + (double)tile * (double)(groups_of(w) * ROWS * WORD_COST);
}

/* Weights that are read one after the other, and what thread `rank` does with tiles `first` to `last` of number `which`. */
struct share {
    const struct weight *const *w;
    void (*run)(const void *job, int64_t rank, int64_t which, int64_t first, int64_t last);
    const void *job;
    int64_t count;
};

/* The tile of weight `which` where the share of thread `rank` of `size` begins, or its end where that is before: shares of
 * all weights together cost the same, however values are spread over rows. */
int64_t first_tile(const struct weight *const *w, int64_t count, int64_t which, int64_t rank, int64_t size) {
    double whole = 0, before = 0;
    for (int64_t i = 0; i < count; i++) {
        if (i == which) before = whole;
        whole += cost_before(w[i], tiles_of(w[i]));
    }
    int64_t low = 0, high = tiles_of(w[which]);
    if (rank == size) return high;
    double begin = whole * (double)rank / (double)size - before;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (cost_before(w[which], middle) < begin) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void run_share(void *data) {
    const struct share *s = data;
    int64_t rank = team_rank(), size = team_size();
    for (int64_t i = 0; i < s->count; i++)
        s->run(s->job, rank, i, first_tile(s->w, s->count, i, rank, size), first_tile(s->w, s->count, i, rank + 1, size));
}

static void share_out(const struct weight *const *w, int64_t count, void (*run)(const void *, int64_t, int64_t, int64_t, int64_t),
                      const void *job, int32_t threads) {
    struct share s = {w, run, job, count};
    if (threads > 1 && parallel && (count > 1 || tiles_of(*w) > 1)) parallel(run_share, &s, (unsigned)threads, 0);
    else
        for (int64_t i = 0; i < count; i++) run(job, 0, i, 0, tiles_of(w[i])); /* whatever its rank in a team of others */
}

/* __builtin_popcount is a call where the compiler may not count on the instruction. */
INLINE int64_t ones(uint64_t n) {
    n -= (n >> 1) & 0x5555555555555555u;
    n = (n & 0x3333333333333333u) + ((n >> 2) & 0x3333333333333333u);
    return (int64_t)((((n + (n >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
}

/* The first row that disagrees with the mask or the offsets, or -1: after this nothing can be read out of bounds. */
int64_t first_bad_row(const uint8_t *mask, const int64_t *offsets, int64_t rows, int64_t columns, int64_t nnz) {
    int64_t width = (columns + 7) / 8;
    if (offsets[0] != 0) return 0;
    for (int64_t row = 0; row < rows; row++, mask += width) {
        int64_t count = 0, b = 0;
        for (; b + 8 <= width; b += 8) {
            uint64_t word;
            memcpy(&word, mask + b, 8);
            count += ones(word);
        }
        for (; b < width; b++) count += ones(mask[b]);
        if (offsets[row + 1] != offsets[row] + count || offsets[row + 1] > nnz) return row;
        if (columns % 8 && mask[width - 1] >> columns % 8) return row;
    }
    return offsets[rows] == nnz ? -1 : rows - 1;
}

struct moving {
    const struct weight *w;
    char *values;     /* neutral, of the whole tensor: (nnz,) */
    uint8_t *mask;    /* (rows, ⌈columns / 8⌉) */
    int64_t *offsets; /* (rows + 1,), where in the values */
    int back;
};

static void move(const void *job, int64_t rank, int64_t which, int64_t first, int64_t last) {
    const struct moving *v = job;
    (void)rank, (void)which;
    const struct weight *w = v->w;
    int64_t groups = groups_of(w), width = (w->columns + 7) / 8;
    const char *tiles_end = (char *)w->values + w->starts[last] * w->dtype;
    const char *neutral_end = v->values + (v->back ? 0 : v->offsets[w->rows] * w->dtype);
    for (int64_t tile = first; tile < last; tile++) {
        char *tiled = (char *)w->values + w->starts[tile] * w->dtype;
        uint32_t *masks = w->masks + tile * groups * ROWS;
        int64_t rows = rows_of(w, tile), at[ROWS], *offsets = v->offsets + tile * ROWS;
        for (int64_t i = 0, begin = w->starts[tile]; i < rows; i++) {
            at[i] = v->back ? begin : offsets[i];
            for (int64_t g = 0; v->back && g < groups; g++) begin += ones(masks[g * ROWS + i]);
            if (v->back) offsets[i] = at[i];
            if (v->back && tile * ROWS + i + 1 == w->rows) offsets[i + 1] = begin;
        }
        for (int64_t g = 0; g < groups; g++)
            for (int64_t i = 0; i < rows; i++) {
                uint32_t *word = &masks[g * ROWS + i];
                uint8_t *bytes = v->mask + (tile * ROWS + i) * width + g * 4;
                int64_t some = width - g * 4 < 4 ? width - g * 4 : 4;
                if (v->back) memcpy(bytes, word, (size_t)some); /* little-endian, as every CPU that this is built for */
                else if (some == 4) memcpy(word, bytes, 4);
                else memcpy(word, bytes, (size_t)some);
                int64_t count = ones(*word);
                char *neutral = v->values + at[i] * w->dtype;
                /* A copy of known size is many times as fast; what it writes too much is written over by the next group. */
                int whole = !v->back && tiles_end - tiled >= COLUMNS * FP32 && neutral_end - neutral >= COLUMNS * FP32;
                if (whole && w->dtype == BF16) memcpy(tiled, neutral, COLUMNS * BF16);
                else if (whole) memcpy(tiled, neutral, COLUMNS * FP32);
                else if (count) memcpy(v->back ? neutral : tiled, v->back ? tiled : neutral, (size_t)(count * w->dtype));
                tiled += count * w->dtype, at[i] += count;
            }
    }
}

/* Fill the tiles of w, whose masks are zero and whose starts are set, from a matrix that first_bad_row has passed. */
void repack(const struct weight *w, const void *values, const uint8_t *mask, const int64_t *offsets, int32_t threads) {
    struct moving v = {w, (char *)values, (uint8_t *)mask, (int64_t *)offsets, 0};
    share_out(&w, 1, move, &v, threads);
}

/* The inverse: fills values, mask and offsets from the tiles. */
void restore(const struct weight *w, void *values, uint8_t *mask, int64_t *offsets, int32_t threads) {
    struct moving v = {w, values, mask, offsets, 1};
    share_out(&w, 1, move, &v, threads);
}
