/* Random matrices written into a file at random places, and read by threads: `fuzz_readers ROUNDS SEED`, as fuzz.c. Each is what
 * `repack` makes of it in memory, or is refused where the file is cut, or a bit of it flipped. */
#define _GNU_SOURCE
#define PIECE 4096 /* so that there are several */
#include "bitmask.c"

#include "fuzz.h"

enum { JOBS = 6, THREADS = 2, MOST_BYTES = 3 * 64 * FP32 * 12 };

struct one {
    struct weight w, wanted;
    const struct weight *pointer;
    struct stored s;
    struct job job;
    int64_t *offsets;
    int32_t *short_offsets;
    int damaged;
};

static void fail(const char *what, long round) {
    printf("%s in round %ld\n", what, round);
    exit(1);
}

static void *zeros(int64_t elements, int64_t size) { return memset(buffer(elements, size), 0, (size_t)(elements * size)); }

static void put_at(int file, const void *bytes, int64_t size, int64_t at) {
    if (pwrite(file, bytes, (size_t)size, at) != size) exit(2);
}

static struct one random_one(int file, int64_t *end) {
    struct one o = {.damaged = (int)draw(3)}; /* 0: no; 1: a bit is flipped; 2: there is more than the file has */
    int64_t rows = 1 + (int64_t)draw(11), columns = 1 + (int64_t)draw(190), width = (columns + 7) / 8, nnz = 0, first = (int64_t)draw(1000);
    int dtype = draw(2) ? FP32 : BF16;
    uint8_t *mask = zeros(rows * width, 1);
    o.offsets = buffer(rows + 1, 8), o.short_offsets = buffer(rows + 1, 4);
    for (int64_t r = 0; r <= rows; r++) {
        o.offsets[r] = first + nnz, o.short_offsets[r] = (int32_t)(first + nnz);
        for (int64_t c = 0; r < rows && c < columns; c++)
            if (draw(3) == 0) mask[r * width + c / 8] |= (uint8_t)(1 << c % 8), nnz++;
    }
    char *values = buffer(nnz, dtype);
    fill(values, nnz, dtype);
    int64_t tiles = (rows + ROWS - 1) / ROWS, words = tiles * ((columns + COLUMNS - 1) / COLUMNS) * ROWS;
    o.w = (struct weight){buffer(nnz + SLACK, dtype), buffer(words, 4), buffer(tiles + 1, 8), rows, columns, dtype};
    o.wanted = (struct weight){zeros(nnz + SLACK, dtype), zeros(words, 4), buffer(tiles + 1, 8), rows, columns, dtype};
    int64_t *starts = (int64_t *)o.wanted.starts, *whole = buffer(rows + 1, 8);
    for (int64_t r = 0; r <= rows; r++) whole[r] = o.offsets[r] - first;
    for (int64_t t = 0; t <= tiles; t++) starts[t] = whole[t < tiles ? t * ROWS : rows];
    repack(&o.wanted, values, mask, whole, 1);
    if (o.damaged == 1) mask[draw((uint64_t)(rows * width))] ^= 1;
    int64_t at = *end + (int64_t)draw(9000), behind = at + nnz * dtype + (int64_t)draw(5000);
    put_at(file, values, nnz * dtype, at), put_at(file, mask, rows * width, behind);
    *end = behind + rows * width;
    int64_t far = o.damaged == 2 ? 1 << 30 : 0;
    o.s = (struct stored){{at, at + nnz * dtype, file, 0}, {behind + far, behind + far + rows * width, file, 0}, o.offsets, 0, 8};
    if (draw(2)) o.s.offsets = o.short_offsets, o.s.offset_bytes = 4;
    free(mask), free(values), free(whole);
    return o;
}

static void look_at(const struct one *o, long round) {
    int64_t tiles = tiles_of(&o->w), nnz = o->wanted.starts[tiles];
    if ((o->job.state == FAILED) != (o->damaged != 0)) fail("damage", round);
    if (o->damaged) return;
    if (memcmp(o->w.starts, o->wanted.starts, (size_t)(tiles + 1) * 8)) fail("starts", round);
    if (memcmp(o->w.masks, o->wanted.masks, (size_t)(tiles * groups_of(&o->w) * ROWS) * 4)) fail("masks", round);
    if (memcmp(o->w.values, o->wanted.values, (size_t)((nnz + SLACK) * o->w.dtype))) fail("values", round);
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    state = 88172645463325252ULL + strtoull(arguments[2], NULL, 10);
    use_team(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
    FILE *stream = tmpfile();
    int file = fileno(stream);
    int64_t room = (MOST_BYTES / BLOCK + 4) * BLOCK, each = room + BLOCK;
    char *scratch = aligned_alloc(BLOCK, (size_t)(THREADS * each));
    for (long round = 0; round < atol(arguments[1]) / 10; round++) {
        struct readers *r = readers_open(THREADS, scratch, each, room);
        struct one jobs[JOBS];
        int64_t end = 0, recalled = 0, gone[JOBS] = {0};
        for (int j = 0; j < JOBS; j++) jobs[j] = random_one(file, &end);
        for (int j = 0; j < JOBS; j++) {
            struct one *o = &jobs[j];
            o->pointer = &o->w, o->job = (struct job){&o->pointer, &o->s, 1, (int64_t)draw(2), 0, NULL, 0};
            readers_submit(r, &o->job);
        }
        if (draw(2)) readers_hurry(r, &jobs[JOBS - 1].job);
        if (draw(2)) recalled += gone[2] = readers_recall(r, &jobs[2].job);
        for (int64_t seen; (seen = readers_finished(r)) < JOBS - recalled;) readers_wait(r, seen);
        readers_close(r), readers_wait(r, JOBS), readers_join(r), readers_free(r);
        for (int j = 0; j < JOBS; j++) {
            struct one *o = &jobs[j];
            if (!gone[j]) look_at(o, round);
            free(o->w.values), free(o->w.masks), free((void *)o->w.starts);
            free(o->wanted.values), free(o->wanted.masks), free((void *)o->wanted.starts);
            free(o->offsets), free(o->short_offsets);
        }
    }
    free(scratch), fclose(stream);
    puts("all right");
    return 0;
}
