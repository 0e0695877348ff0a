/* Matrices out of files into tiles: read past the page cache where a file is opened so, checked, and repacked. What goes wrong
 * is not told from what else may be wrong: the caller reads again in its own way, and says so. */
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#ifndef PIECE
#define PIECE (1 << 20) /* bytes of a read after which it gives way to others */
#endif
enum { BLOCK = 4096 };  /* where reads begin and end: as in storage/direct.py */

typedef int may_go_on(void *whom); /* between pieces; 0: nobody wants it any more */

struct span {
    int64_t begin, end; /* bytes of a file */
    int32_t file, direct;
};

/* A matrix where it lies. */
struct stored {
    struct span values, mask;
    const void *offsets; /* (rows + 1,) where each row begins in a tensor of which this is a part; NULL: `each` values a row */
    int64_t each;
    int32_t offset_bytes; /* of a number of it */
};

/* Bytes of memory that a span may fill. */
static int64_t room_for(const struct span *s) { return (s->end - s->begin + BLOCK - 1) / BLOCK * BLOCK + BLOCK; }

/* Where in `memory`, on the boundary of a block, the bytes are that were asked for, or NULL. */
static const char *read_span(const struct span *s, char *memory, may_go_on *ask, void *whom) {
    int64_t first = s->begin / BLOCK * BLOCK, last = (s->end + BLOCK - 1) / BLOCK * BLOCK, place = first;
    while (s->begin < s->end && place < s->end) {
        if (ask && place > first && !ask(whom)) return NULL;
        int64_t size = ask && last - place > PIECE ? PIECE : last - place;
        ssize_t got = pread(s->file, memory + (place - first), (size_t)size, place);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return NULL;
        place += got;
    }
#ifdef POSIX_FADV_DONTNEED /* of no bytes it would mean all that follow */
    if (!s->direct && first < last) posix_fadvise(s->file, first, last - first, POSIX_FADV_DONTNEED);
#endif
    return memory + (s->begin - first);
}

static int64_t offset_of(const struct stored *s, int64_t row) {
    if (!s->offsets) return row * s->each;
    return s->offset_bytes == 4 ? ((const int32_t *)s->offsets)[row] : ((const int64_t *)s->offsets)[row];
}

/* `starts` of w are set here, and what is behind its last value and its last row; `offsets` is room for rows + 1 of them. */
static int32_t load(const struct weight *w, const struct stored *s, char *scratch, int64_t *offsets, may_go_on *ask, void *whom) {
    const char *values = read_span(&s->values, scratch, ask, whom);
    const char *mask = values ? read_span(&s->mask, scratch + room_for(&s->values), ask, whom) : NULL;
    if (!mask) return -1;
    int64_t nnz = (s->values.end - s->values.begin) / w->dtype, tiles = tiles_of(w), first = offset_of(s, 0);
    for (int64_t row = 0; row <= w->rows; row++) offsets[row] = offset_of(s, row) - first;
    if (first_bad_row((const uint8_t *)mask, offsets, w->rows, w->columns, nnz) >= 0) return -1;
    int64_t *starts = (int64_t *)w->starts;
    for (int64_t tile = 0; tile < tiles; tile++) starts[tile] = offsets[tile * ROWS];
    starts[tiles] = nnz;
    memset((char *)w->values + nnz * w->dtype, 0, (size_t)(SLACK * w->dtype));
    if (tiles && (w->rows % ROWS || w->columns % COLUMNS)) memset(w->masks, 0, (size_t)(tiles * groups_of(w) * ROWS) * 4);
    repack(w, values, (const uint8_t *)mask, offsets, 1); /* other threads are others' */
    return 0;
}

static int32_t load_all(const struct weight *const *w, const struct stored *s, int64_t count, char *scratch, int64_t *offsets,
                        may_go_on *ask, void *whom) {
    for (int64_t i = 0; i < count; i++)
        if (load(w[i], &s[i], scratch, offsets, ask, whom)) return -1;
    return 0;
}

/* 0 where all of `count` matrices are there and right. `scratch`, on the boundary of a block, has room to read each of them. */
int32_t load_stored(const struct weight *const *w, const struct stored *s, int64_t count, char *scratch, int64_t *offsets) {
    return load_all(w, s, count, scratch, offsets, NULL, NULL);
}
