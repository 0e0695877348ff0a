/* Work shared out to the threads of the OpenMP runtime that is already in the process: linking one could bring a second,
 * and two pools of spinning threads would fight for the cores. */
#include <stdint.h>

typedef void team_parallel(void (*)(void *), void *, unsigned threads, unsigned flags); /* GOMP_parallel */
static team_parallel *parallel;
static int (*team_rank)(void), (*team_size)(void);

void use_team(team_parallel *run, int (*rank)(void), int (*size)(void)) {
    parallel = run, team_rank = rank, team_size = size;
}
