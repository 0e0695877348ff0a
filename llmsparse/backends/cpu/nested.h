/* How a weight W = steps · q lies in memory for the kernels of nested.c, and the way there from a nested stream.
 *
 * Rows are cut into tiles of ROWS, columns into runs of RUN; order: tile, run, row of the tile. Small numbers lie in three
 * streams that are read strictly forward:
 *
 *   pairs      RUN bytes for a run of a tile: byte c holds column c of each row, row i in bits 2i: 0, +1, -1, or "more"
 *   escapes    4 bits for each "more", q + OFFSET from 0 to 15: byte n of two rows has the n-th of one in its low and the n-th of the
 *              other in its high half, as many bytes as the row has that has more
 *   counts     bytes of escapes of each two rows of a run
 *   list       of each row, what is beyond that: column, and q; the escape holds the nearest that it can
 *
 * Where many are beyond (int8 values under a mask) a weight is `wide`: 64 bits of mask for a row of a run in place of the pairs, and
 * the numbers as int8 in place of escapes.
 */
#include <math.h>
#include <stdlib.h>

#include "floats.h"
#include "share.h"

enum { ROWS = 4, RUN = 64, OFFSET = 8, LOWEST = -OFFSET, HIGHEST = 15 - OFFSET, SLACK = 64 };
enum { INT8 = 1 };      /* beside BF16 and FP32 */
enum { DEEPEST = 130 }; /* levels of a code: one a number, at most */

struct nested {
    const uint8_t *pairs;   /* (tiles, runs, RUN); wide: (tiles, runs, ROWS) 64-bit masks */
    const uint8_t *escapes; /* and SLACK bytes behind */
    const uint8_t *counts;  /* (tiles, runs, ROWS / 2); wide: none */
    const int64_t *starts;  /* (tiles + 1,) where in the escapes each tile begins */
    const int64_t *listed;  /* (rows + 1,) where in the list each row begins */
    const int32_t *columns_listed;
    const int8_t *numbers_listed;
    const uint16_t *steps; /* bf16 (rows, columns / group) */
    int64_t rows, columns, group; /* a multiple of RUN, or all columns */
    int32_t wide, stored, dtype;  /* what steps · q is rounded to, and what x and y are of */
};

static int64_t tiles_of(const struct nested *w) { return (w->rows + ROWS - 1) / ROWS; }
static int64_t runs_of(const struct nested *w) { return (w->columns + RUN - 1) / RUN; }
static int64_t rows_in(const struct nested *w, int64_t tile) {
    int64_t left = w->rows - tile * ROWS;
    return left < ROWS ? left : ROWS;
}

/* A nested stream (docs/packed-format.md) → numbers. */
struct code {
    int32_t levels;
    int32_t digits[DEEPEST], fours[DEEPEST], finals[DEEPEST]; /* the largest |q| that ends at a level */
};
struct bits {
    const uint8_t *data;
    int64_t size, at; /* bytes, and bits read */
};
static unsigned take(struct bits *b, int width) { /* width ≤ 8; zeros behind the end, which `short_of` then tells */
    int64_t byte = b->at / 8;
    unsigned low = byte < b->size ? b->data[byte] : 0, high = byte + 1 < b->size ? b->data[byte + 1] : 0;
    unsigned v = (low | high << 8) >> b->at % 8 & ((1u << width) - 1);
    b->at += width;
    return v;
}
static void align(struct bits *b) { b->at = (b->at + 7) / 8 * 8; }

struct flags { /* digits of one level, one after the other */
    struct bits groups, digits;
    int width, fours, left;
    unsigned four;
};
static struct flags begin(struct bits *b, int64_t count, int width, int fours) {
    struct flags f = {*b, *b, width, fours, 0, 0};
    if (!fours) {
        b->at += count * width;
        align(b);
        return f;
    }
    int64_t groups = (count + 3) / 4, some = 0;
    struct bits g = *b;
    for (int64_t i = 0; i < groups; i++) some += take(&g, 1);
    align(&g);
    f.digits = g;
    b->at = g.at + some * 4;
    align(b);
    return f;
}
static unsigned next(struct flags *f) {
    if (!f->fours) return take(&f->digits, f->width);
    if (!f->left) f->four = take(&f->groups, 1) ? take(&f->digits, 4) : 0, f->left = 4;
    unsigned v = f->four & 1;
    f->four >>= 1, f->left--;
    return v;
}

/* One tile: q (items,), `open` (items,) to work in. Whether the bytes were as many as that takes. */
static int32_t decode(const uint8_t *data, int64_t size, int64_t items, const struct code *code, int8_t *q, uint32_t *open) {
    struct bits b = {data, size, 0};
    int64_t count = 0;
    for (int level = 0; level < code->levels; level++) {
        int width = code->digits[level], last = level == code->levels - 1, final = code->finals[level];
        struct flags f = begin(&b, level ? count : items, width, code->fours[level]);
        if (b.at > size * 8) return 0;
        if (level == 0) {
            unsigned top = (1u << width) - 1;
            for (int64_t i = 0; i < items; i++) {
                unsigned s = next(&f);
                int more = s == top;
                q[i] = (int8_t)(s & 1 ? (int)(s + 1) / 2 : -(int)(s / 2));
                open[count] = (uint32_t)i, count += more;
            }
            if (last && count) return 0;
            continue;
        }
        int64_t still = 0;
        int reached = code->finals[level - 1] + 1;
        for (int64_t n = 0; n < count; n++) {
            unsigned s = next(&f);
            uint32_t i = open[n];
            int negative = level == 1 ? (int)(s & 1) : q[i] < 0, size_of = reached + (int)(level == 1 ? s >> 1 : s);
            if (size_of > 127) return 0;
            q[i] = (int8_t)(negative ? -size_of : size_of);
            open[still] = i, still += size_of > final;
        }
        count = still;
    }
    return b.at == size * 8;
}

struct decoding {
    const uint8_t *stream;
    const int64_t *tiles; /* (count + 1,) */
    const int64_t *first; /* (count + 1,) row where each tile begins */
    int64_t columns;
    const struct code *code;
    int8_t *q;
    int32_t *right; /* (count,) */
};
static void decode_tiles(const void *job, int64_t rank, int64_t from, int64_t to) {
    (void)rank;
    const struct decoding *d = job;
    for (int64_t t = from; t < to; t++) {
        int64_t items = (d->first[t + 1] - d->first[t]) * d->columns;
        uint32_t *open = malloc((size_t)(items + 1) * sizeof *open);
        d->right[t] = open && decode(d->stream + d->tiles[t], d->tiles[t + 1] - d->tiles[t], items, d->code,
                                     d->q + d->first[t] * d->columns, open);
        free(open);
    }
}
void nested_decode(const uint8_t *stream, const int64_t *tiles, const int64_t *first, int64_t count, int64_t columns,
                   const struct code *code, int8_t *q, int32_t *right, int32_t threads) {
    struct decoding d = {stream, tiles, first, columns, code, q, right};
    share_out(decode_tiles, &d, count, threads);
}

static int is_listed(int q) { return q < LOWEST || q > HIGHEST; }
static unsigned pair_of(int q) { return q == 0 ? 0 : q == 1 ? 1 : q == -1 ? 2 : 3; }
static unsigned escape_of(int q) { return (unsigned)((q < LOWEST ? LOWEST : q > HIGHEST ? HIGHEST : q) + OFFSET); }

/* How many of the numbers of a row in a run have an escape; listed ones are added. A wide weight's have one where they are not 0. */
static int64_t escapes_in(const struct nested *w, const int8_t *q, int64_t row, int64_t run, int64_t *listed) {
    int64_t n = 0;
    if (row >= w->rows) return 0;
    for (int64_t c = run * RUN; c < (run + 1) * RUN && c < w->columns; c++) {
        int v = q[row * w->columns + c];
        n += w->wide ? v != 0 : pair_of(v) == 3, *listed += !w->wide && is_listed(v);
    }
    return n;
}

/* Bytes of escapes of every tile → starts, of every two rows of a run → counts, and listed numbers of every row → listed. Starts and
 * listed are (… + 1,), running sums. */
void nested_measure(const struct nested *w, const int8_t *q, int64_t *starts, int64_t *listed, uint8_t *counts) {
    starts[0] = listed[0] = 0;
    for (int64_t t = 0; t < tiles_of(w); t++) {
        int64_t more[ROWS] = {0};
        starts[t + 1] = starts[t];
        for (int64_t r = 0; r < runs_of(w); r++)
            for (int64_t i = 0; i < ROWS; i += 2) {
                int64_t a = escapes_in(w, q, t * ROWS + i, r, &more[i]), b = escapes_in(w, q, t * ROWS + i + 1, r, &more[i + 1]);
                starts[t + 1] += w->wide ? a + b : a > b ? a : b;
                if (!w->wide) *counts++ = (uint8_t)(a > b ? a : b);
            }
        for (int64_t i = 0; i < rows_in(w, t); i++) listed[t * ROWS + i + 1] = listed[t * ROWS + i] + more[i];
    }
}

/* Fill what w points to, zero before, from q; w's starts, counts and listed as of nested_measure. */
void nested_fill(const struct nested *w, const int8_t *q) {
    uint8_t *pairs = (uint8_t *)w->pairs, *escapes = (uint8_t *)w->escapes;
    uint64_t *masks = (uint64_t *)w->pairs;
    for (int64_t t = 0; t < tiles_of(w); t++) {
        uint8_t *to = escapes + w->starts[t];
        int64_t at[ROWS];
        for (int64_t i = 0; i < rows_in(w, t); i++) at[i] = w->listed[t * ROWS + i];
        for (int64_t r = 0; r < runs_of(w); r++)
            for (int64_t i = 0; i < ROWS; i++) {
                int64_t row = t * ROWS + i, place = t * runs_of(w) + r, n = 0;
                for (int64_t l = 0; row < w->rows && l < RUN && r * RUN + l < w->columns; l++) {
                    int v = q[row * w->columns + r * RUN + l];
                    if (w->wide) {
                        if (v) masks[place * ROWS + i] |= 1ull << l, *to++ = (uint8_t)v;
                        continue;
                    }
                    pairs[place * RUN + l] |= (uint8_t)(pair_of(v) << 2 * i);
                    if (pair_of(v) != 3) continue;
                    to[n++] |= (uint8_t)(escape_of(v) << 4 * (i % 2));
                    if (!is_listed(v)) continue;
                    ((int32_t *)w->columns_listed)[at[i]] = (int32_t)(r * RUN + l);
                    ((int8_t *)w->numbers_listed)[at[i]++] = (int8_t)v;
                }
                if (!w->wide && i % 2) to += w->counts[place * ROWS / 2 + i / 2];
            }
    }
}
