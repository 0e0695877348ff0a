/* Random matrices written into a file at random places, and read by threads: `fuzz_readers ROUNDS SEED`, as fuzz.c. Each is what
 * `repack` makes of it in memory, or is refused where the file is cut, a bit of it flipped, or where its rows begin damaged. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { JOBS = 6, THREADS = 3, MATRICES = 3 };

static void fail(const char *what, long round) {
    printf("%s in round %ld\n", what, round);
    exit(1);
}

/* What the machine would do otherwise: it gives fewer threads than it is asked for, and a disk is held up. */
static int threads_left;
static pthread_mutex_t disk = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static int held_up = -1; /* the file of which nothing comes but its first piece */
static int pieces;       /* of it that were asked for */

static int few_threads(pthread_t *thread, const pthread_attr_t *how, void *(*begin)(void *), void *data) {
    return threads_left-- > 0 ? pthread_create(thread, how, begin, data) : 11;
}

static ssize_t slow_pread(int file, void *memory, size_t size, off_t at) {
    pthread_mutex_lock(&disk);
    if (file == held_up) {
        pieces++;
        pthread_cond_broadcast(&moved);
        while (file == held_up && pieces > 1) pthread_cond_wait(&moved, &disk);
    }
    pthread_mutex_unlock(&disk);
    return pread(file, memory, size, at);
}

static int some_advise(int file, off_t at, off_t size, int advice) {
    if (size <= 0) fail("the rest of a file is given up", 0);
    return posix_fadvise(file, at, size, advice);
}

#define pthread_create few_threads
#define pread slow_pread
#define posix_fadvise some_advise
#define PIECE 4096 /* so that there are several */
#include "bitmask.c"
#undef pread

#include "fuzz.h"

enum { MOST_BYTES = 60 * 190 * FP32 };

struct one {
    struct weight w, wanted;
    int64_t *offsets;
    int32_t *short_offsets;
    int damaged;
};

struct some {
    struct one one[MATRICES];
    const struct weight *pointers[MATRICES];
    struct stored stored[MATRICES];
    struct job job;
    int damaged;
};

static void *zeros(int64_t elements, int64_t size) { return memset(buffer(elements, size), 0, (size_t)(elements * size)); }

static void put_at(int file, const void *bytes, int64_t size, int64_t at) {
    if (pwrite(file, bytes, (size_t)size, at) != size) exit(2);
}

static struct one random_one(int file, int64_t *end, struct stored *s, int large) {
    struct one o = {.damaged = (int)draw(12)}; /* 1: a bit is flipped; 2: there is more than the file has; 3: offsets; or not */
    int64_t rows = large ? 60 : 1 + (int64_t)draw(11), columns = large ? 190 : 1 + (int64_t)draw(190), width = (columns + 7) / 8, nnz = 0, first = (int64_t)draw(1000);
    int dtype = draw(2) ? FP32 : BF16, pattern = draw(3) == 0, none = !pattern && draw(4) == 0;
    if (o.damaged > 3) o.damaged = 0;
    uint8_t *mask = zeros(rows * width, 1);
    o.offsets = buffer(rows + 1, 8), o.short_offsets = buffer(rows + 1, 4);
    if (pattern) first = 0;
    for (int64_t r = 0; r <= rows; r++) {
        o.offsets[r] = first + nnz, o.short_offsets[r] = (int32_t)(first + nnz);
        for (int64_t c = 0; r < rows && c < columns; c++)
            if (!none && (pattern ? c % 2 == 0 : draw(3) == 0)) mask[r * width + c / 8] |= (uint8_t)(1 << c % 8), nnz++;
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
    if (draw(4) == 0) at = (at + BLOCK - 1) / BLOCK * BLOCK, behind = at + nnz * dtype;
    put_at(file, values, nnz * dtype, at), put_at(file, mask, rows * width, behind);
    *end = behind + rows * width;
    int64_t far = o.damaged == 2 ? 1 << 30 : 0;
    *s = (struct stored){{at, at + nnz * dtype, file, 0}, {behind + far, behind + far + rows * width, file, 0}, o.offsets, 0, 8};
    if (draw(2)) s->offsets = o.short_offsets, s->offset_bytes = 4;
    if (o.damaged == 3) {
        int64_t row = (int64_t)draw((uint64_t)rows + 1), wrong = draw(2) ? -(int64_t)draw(1 << 30) - 1 : (int64_t)draw(1 << 30) + 2000;
        o.offsets[row] = wrong, o.short_offsets[row] = (int32_t)wrong;
    }
    if (pattern && o.damaged != 3) s->offsets = NULL, s->each = nnz / rows;
    free(mask), free(values), free(whole);
    return o;
}

static struct some *random_job(int file, int64_t *end, int64_t ahead, int64_t count, int large) {
    struct some *job = calloc(1, sizeof *job);
    for (int64_t i = 0; i < count; i++) {
        job->one[i] = random_one(file, end, &job->stored[i], large);
        job->pointers[i] = &job->one[i].w, job->damaged |= job->one[i].damaged;
    }
    job->job = (struct job){job->pointers, job->stored, count, ahead, NEW, NULL, 0};
    return job;
}

static void look_at(const struct some *job, long round) {
    if ((job_state(&job->job) == FAILED) != (job->damaged != 0)) fail("damage", round);
    for (int64_t i = 0; i < job->job.count && !job->damaged; i++) {
        const struct one *o = &job->one[i];
        int64_t tiles = tiles_of(&o->w), nnz = o->wanted.starts[tiles];
        if (memcmp(o->w.starts, o->wanted.starts, (size_t)(tiles + 1) * 8)) fail("starts", round);
        if (memcmp(o->w.masks, o->wanted.masks, (size_t)(tiles * groups_of(&o->w) * ROWS) * 4)) fail("masks", round);
        if (memcmp(o->w.values, o->wanted.values, (size_t)((nnz + SLACK) * o->w.dtype))) fail("values", round);
    }
}

static void let_go(struct some *job) {
    for (int64_t i = 0; i < job->job.count; i++) {
        struct one *o = &job->one[i];
        free(o->w.values), free(o->w.masks), free((void *)o->w.starts);
        free(o->wanted.values), free(o->wanted.masks), free((void *)o->wanted.starts);
        free(o->offsets), free(o->short_offsets);
    }
    free(job);
}

static int64_t room, each;
static char *scratch;

static struct readers *readers_of(int threads) {
    threads_left = threads;
    return readers_open(THREADS, scratch, each, room);
}

static void end(struct readers *r) { readers_close(r), readers_wait(r, JOBS), readers_join(r), readers_free(r); }

static void wait_for(struct readers *r, int64_t finished) {
    time_t until = time(NULL) + 20;
    for (int64_t seen; (seen = readers_finished(r)) < finished; readers_wait(r, seen))
        if (time(NULL) > until) fail("waiting for ever", 0);
}

static void random_round(int file, long round) {
    struct readers *r = readers_of(1 + (int)draw(THREADS));
    struct some *jobs[JOBS];
    int64_t place = 0, recalled = 0, gone[JOBS] = {0};
    int early = draw(4) == 0; /* it is closed while they are read */
    for (int j = 0; j < JOBS; j++) jobs[j] = random_job(file, &place, (int64_t)draw(2), 1 + (int64_t)draw(MATRICES), 0);
    for (int j = 0; j < JOBS; j++) readers_submit(r, &jobs[j]->job);
    if (draw(2)) readers_hurry(r, &jobs[JOBS - 1]->job);
    if (draw(2)) recalled += gone[2] = readers_recall(r, &jobs[2]->job);
    if (!early) wait_for(r, JOBS - recalled);
    end(r);
    for (int j = 0; j < JOBS; j++) {
        if (!gone[j] && !early) look_at(jobs[j], round);
        if (job_state(&jobs[j]->job) == READING || (early && jobs[j]->damaged && job_state(&jobs[j]->job) == READ)) fail("end", round);
        let_go(jobs[j]);
    }
}

/* A whole job of several pieces. */
static struct some *large_job(int file, int64_t ahead) {
    static int64_t place;
    for (struct some *job;; let_go(job)) {
        job = random_job(file, &place, ahead, 1, 1);
        if (!job->damaged && job->stored[0].values.end - job->stored[0].values.begin > 2 * BLOCK) return job;
    }
}

static void hold_up(int file) {
    pthread_mutex_lock(&disk);
    held_up = file, pieces = 0;
    pthread_cond_broadcast(&moved);
    pthread_mutex_unlock(&disk);
}

static int pieces_soon(int wanted) {
    for (int tries = 0; tries < 200; tries++) {
        pthread_mutex_lock(&disk);
        int found = pieces;
        pthread_mutex_unlock(&disk);
        if (found >= wanted) return found;
        usleep(1000);
    }
    return pieces;
}

/* What is read ahead leaves a thread free for what is wanted, in front of all that waits, and goes on after it. */
static void orderly_round(int file, int other, int threads) {
    struct readers *r = readers_of(threads);
    struct some *slow = large_job(file, 1), *queued[THREADS], *wanted = large_job(other, 0);
    hold_up(file);
    readers_submit(r, &slow->job);
    if (pieces_soon(2) != 2) fail("pieces", 0);
    for (int j = 0; j < THREADS; j++) queued[j] = large_job(file, 1), readers_submit(r, &queued[j]->job);
    usleep(20000); /* whoever may begin one has done so */
    if (threads > 1) {
        readers_submit(r, &wanted->job), wait_for(r, 1);
        if (job_state(&wanted->job) != READ || job_state(&slow->job) != READING) fail("what is wanted waits", 0);
    } else if (readers_submit(r, &wanted->job), job_state(&queued[0]->job) != QUEUED) fail("order", 0);
    hold_up(-1);
    wait_for(r, 2);
    if (job_state(&wanted->job) != READ) fail("what is wanted is late", 0);
    wait_for(r, THREADS + 2), end(r);
    for (int j = 0; j < THREADS; j++) look_at(queued[j], 0), let_go(queued[j]);
    look_at(slow, 0), look_at(wanted, 0), let_go(slow), let_go(wanted);
}

/* It stops before its next piece as long as something is wanted. */
static void giving_way(int file, int other) {
    struct readers *r = readers_of(2);
    struct some *ahead = large_job(file, 1), *wanted = large_job(other, 0);
    hold_up(file);
    readers_submit(r, &ahead->job);
    if (pieces_soon(2) != 2) fail("pieces", 0);
    pthread_mutex_lock(&disk);
    held_up = other, pieces = 1; /* from its first piece on; what is read ahead gets its own */
    pthread_mutex_unlock(&disk);
    readers_submit(r, &wanted->job);
    if (pieces_soon(2) != 2) fail("pieces", 0);
    usleep(20000);
    if (job_state(&ahead->job) != READING) fail("it does not give way", 0);
    hold_up(-1);
    wait_for(r, 2), end(r);
    look_at(ahead, 0), look_at(wanted, 0), let_go(ahead), let_go(wanted);
}

/* And goes on where that is recalled. */
static void recalling(int file, int other) {
    struct readers *r = readers_of(2);
    struct some *ahead = large_job(file, 1), *wanted = large_job(other, 0);
    int64_t finished = 0;
    for (int turn = 0; turn < 3000; turn++) {
        readers_submit(r, &ahead->job);
        for (uint64_t pause = draw(100000); pause; pause--) __asm__ volatile("");
        readers_submit(r, &wanted->job);
        finished += 2 - readers_recall(r, &wanted->job);
        wait_for(r, finished);
    }
    end(r), let_go(ahead), let_go(wanted);
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    alarm(300); /* whoever waits for ever fails */
    state = 88172645463325252ULL + strtoull(arguments[2], NULL, 10);
    use_team(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
    FILE *stream = tmpfile(), *other = tmpfile();
    room = (MOST_BYTES / BLOCK + 4) * BLOCK, each = room + BLOCK;
    scratch = aligned_alloc(BLOCK, (size_t)(THREADS * each));
    for (int threads = 1; threads <= THREADS; threads++) orderly_round(fileno(stream), fileno(other), threads);
    giving_way(fileno(stream), fileno(other)), recalling(fileno(stream), fileno(other));
    for (long round = 0; round < atol(arguments[1]) / 10; round++) random_round(fileno(stream), round);
    free(scratch), fclose(stream), fclose(other);
    puts("all right");
    return 0;
}
