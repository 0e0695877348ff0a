/* Tiles of a product, shared out among the threads of a team: evenly, in order. */

#include "team.h"

struct share {
    void (*run)(const void *job, int64_t rank, int64_t first, int64_t last); /* rank: which of the threads, from 0 */
    const void *job;
    int64_t tiles;
};
static void run_share(void *data) {
    const struct share *s = data;
    int64_t rank = team_rank(), size = team_size();
    s->run(s->job, rank, s->tiles * rank / size, s->tiles * (rank + 1) / size);
}
static void share_out(void (*run)(const void *, int64_t, int64_t, int64_t), const void *job, int64_t tiles, int32_t threads) {
    struct share s = {run, job, tiles};
    if (threads > 1 && parallel && tiles > 1) parallel(run_share, &s, (unsigned)threads, 0);
    else run(job, 0, 0, tiles); /* whatever its rank in a team of others */
}
