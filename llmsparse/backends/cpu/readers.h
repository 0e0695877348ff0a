/* Threads that fill weights from files as they are told. They are C's own: the interpreter's lock is none of their business, and
 * whoever multiplies meanwhile does not wait for it. What is wanted now is read before what is read ahead, for which one
 * thread fewer is used, and which stops for it between two pieces: so that a large one does not share the disk with it. */
#include <pthread.h>
#include <time.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include "stored.h"

enum { NEW, QUEUED, READING, READ, FAILED };

struct job {
    const struct weight *const *w;
    struct stored *s;
    int64_t count, ahead, state;
    struct job *next;
    int64_t early; /* it was begun ahead */
};

struct own {
    struct readers *r;
    struct job *job;
};

struct readers {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    struct job *first;
    int64_t finished;    /* jobs, ever */
    int64_t wanted;      /* that are not read ahead, and not finished */
    int64_t early, most; /* that are being read ahead, and how many may be: one thread fewer than there are */
    int64_t closed, threads, begun;
    char *scratch; /* of all threads, `each` bytes for one */
    int64_t each, room; /* where in its part there is room for offsets */
    pthread_t thread[];
};

/* Others look at it without the lock. */
static void set_state(struct job *job, int64_t state) { __atomic_store_n(&job->state, state, __ATOMIC_RELEASE); }

int64_t job_state(const struct job *job) { return __atomic_load_n(&job->state, __ATOMIC_ACQUIRE); }

/* The job to be done next, no longer queued. */
static struct job *next_job(struct readers *r) {
    struct job **link = &r->first;
    while (*link && (*link)->ahead) link = &(*link)->next;
    if (!*link && r->early < r->most) link = &r->first;
    struct job *job = *link;
    if (job) *link = job->next, set_state(job, READING), r->early += job->early = job->ahead;
    return job;
}

static int may_read_on(void *whom) {
    struct own *o = whom;
    pthread_mutex_lock(&o->r->lock);
    while (o->job->ahead && o->r->wanted && o->r->threads > 1 && !o->r->closed) pthread_cond_wait(&o->r->work, &o->r->lock);
    int open = !o->r->closed;
    pthread_mutex_unlock(&o->r->lock);
    return open;
}

static void *read_jobs(void *data) {
    struct readers *r = data;
#ifdef __linux__
    prctl(PR_SET_NAME, "experts"); /* as `top -H` shows them */
#endif
    pthread_mutex_lock(&r->lock);
    char *scratch = r->scratch + r->begun++ * r->each;
    while (!r->closed) {
        struct job *job = next_job(r);
        if (!job) {
            pthread_cond_wait(&r->work, &r->lock);
            continue;
        }
        pthread_mutex_unlock(&r->lock);
        struct own own = {r, job};
        int32_t status = load_all(job->w, job->s, job->count, scratch, (int64_t *)(scratch + r->room), may_read_on, &own);
        pthread_mutex_lock(&r->lock);
        r->early -= job->early;
        if (!job->ahead) r->wanted--;
        pthread_cond_broadcast(&r->work);
        set_state(job, status ? FAILED : READ);
        __atomic_store_n(&r->finished, r->finished + 1, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&r->done);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* NULL where there are no threads to be had. */
struct readers *readers_open(int64_t threads, char *scratch, int64_t each, int64_t room) {
    struct readers *r = calloc(1, sizeof *r + (size_t)threads * sizeof *r->thread);
    if (!r) return NULL;
    pthread_mutex_init(&r->lock, NULL), pthread_cond_init(&r->work, NULL), pthread_cond_init(&r->done, NULL);
    r->scratch = scratch, r->each = each, r->room = room;
    pthread_mutex_lock(&r->lock); /* they count each other */
    while (r->threads < threads && !pthread_create(&r->thread[r->threads], NULL, read_jobs, r)) r->threads++;
    r->most = r->threads > 1 ? r->threads - 1 : 1; /* there may be fewer than asked for */
    pthread_mutex_unlock(&r->lock);
    if (r->threads) return r;
    free(r);
    return NULL;
}

void readers_submit(struct readers *r, struct job *job) {
    pthread_mutex_lock(&r->lock);
    struct job **end = &r->first;
    while (*end) end = &(*end)->next;
    job->next = NULL, set_state(job, QUEUED), *end = job;
    if (!job->ahead) r->wanted++;
    pthread_cond_broadcast(&r->work);
    pthread_mutex_unlock(&r->lock);
}

/* A job that was read ahead is wanted now. */
void readers_hurry(struct readers *r, struct job *job) {
    pthread_mutex_lock(&r->lock);
    if (job->ahead && job->state < READ) r->wanted++;
    job->ahead = 0;
    pthread_cond_broadcast(&r->work);
    pthread_mutex_unlock(&r->lock);
}

/* Whether a job was not begun; it is not queued any more. */
int32_t readers_recall(struct readers *r, struct job *job) {
    pthread_mutex_lock(&r->lock);
    struct job **link = &r->first;
    while (*link && *link != job) link = &(*link)->next;
    int32_t found = *link != NULL;
    if (found) *link = job->next;
    if (found && !job->ahead && !--r->wanted) pthread_cond_broadcast(&r->work); /* what gave way to it goes on */
    pthread_mutex_unlock(&r->lock);
    return found;
}

int64_t readers_finished(struct readers *r) { return __atomic_load_n(&r->finished, __ATOMIC_ACQUIRE); }

/* Until more than `seen` jobs are finished, or none will be; at most for a fifth of a second, so that who waits can be
 * interrupted. */
void readers_wait(struct readers *r, int64_t seen) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until); /* of which condition variables know everywhere */
    until.tv_nsec += 200000000;
    if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
    pthread_mutex_lock(&r->lock);
    for (int late = 0; r->finished <= seen && !r->closed && !late;) late = pthread_cond_timedwait(&r->done, &r->lock, &until);
    pthread_mutex_unlock(&r->lock);
}

/* No job is begun any more. */
void readers_close(struct readers *r) {
    pthread_mutex_lock(&r->lock);
    r->closed = 1;
    pthread_cond_broadcast(&r->work), pthread_cond_broadcast(&r->done);
    pthread_mutex_unlock(&r->lock);
}

/* After it has been closed, once: until all threads are gone. Others may still ask what is finished. */
void readers_join(struct readers *r) {
    for (int64_t i = 0; i < r->threads; i++) pthread_join(r->thread[i], NULL);
}

void readers_free(struct readers *r) { free(r); }
