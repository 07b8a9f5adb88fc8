/*
 * The control thread: what is posted runs, in order, or is refused; members and timers.
 */
#include "control.h"
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { THREADS = 8, POSTS = 2000 };

static int start(void **state) {
    return meshx_loop_start((struct meshx_loop **)state);
}

static int stop(void **state) {
    meshx_loop_stop(*state, 0);
    return 0;
}

/* ---- posting ---- */

struct order {
    int next;
    bool kept;
};

struct step {
    struct order *order;
    int number;
};

static void check_step(void *argument) {
    struct step *step = argument;
    if (step->order->next++ != step->number) {
        step->order->kept = false;
    }
}

static void nothing(void *argument) {
    (void)argument;
}

static void posts_of_one_thread_run_in_order(void **state) {
    static struct step steps[POSTS];
    struct order order = {.next = 0, .kept = true};
    for (int i = 0; i < POSTS; i++) {
        steps[i] = (struct step){&order, i};
        assert_int_equal(loop_post(*state, check_step, &steps[i]), MESHX_OK);
    }
    control_run(*state, nothing, NULL);
    assert_int_equal(order.next, POSTS);
    assert_true(order.kept);
}

struct poster {
    struct meshx_loop *loop;
    struct order order;
    struct step steps[POSTS];
};

static void *post_all(void *argument) {
    struct poster *poster = argument;
    for (int i = 0; i < POSTS; i++) {
        poster->steps[i] = (struct step){&poster->order, i};
        if (loop_post(poster->loop, check_step, &poster->steps[i]) != MESHX_OK) {
            break;
        }
    }
    return NULL;
}

/* A stop right behind the posts: all of them run all the same. */
static void posts_of_many_threads_all_run_before_the_stop(void **state) {
    (void)state;
    static struct poster posters[THREADS];
    pthread_t threads[THREADS];
    struct meshx_loop *loop;
    assert_int_equal(meshx_loop_start(&loop), MESHX_OK);
    for (int i = 0; i < THREADS; i++) {
        posters[i].loop = loop;
        posters[i].order = (struct order){.next = 0, .kept = true};
        assert_int_equal(pthread_create(&threads[i], NULL, post_all, &posters[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    meshx_loop_stop(loop, 0);
    for (int i = 0; i < THREADS; i++) {
        assert_int_equal(posters[i].order.next, POSTS);
        assert_true(posters[i].order.kept);
    }
}

struct race {
    struct meshx_loop *loop;
    struct loop_member member;
    pthread_t threads[THREADS];
    atomic_int accepted;
    atomic_int refused;
    int ran; /* control thread only, until it has ended */
};

static void count_run(void *argument) {
    struct race *race = argument;
    race->ran++;
}

static void *post_until_stopped(void *argument) {
    struct race *race = argument;
    int code;
    while ((code = loop_post(race->loop, count_run, race)) == MESHX_OK) {
        atomic_fetch_add(&race->accepted, 1);
    }
    if (code == MESHX_ESTOPPED) {
        atomic_fetch_add(&race->refused, 1);
    }
    return NULL;
}

/* The member keeps the loop alive until the last of its posters has been refused. */
static void join_posters(void *self) {
    struct race *race = self;
    for (int i = 0; i < THREADS; i++) {
        pthread_join(race->threads[i], NULL);
    }
    loop_leave(race->loop, &race->member);
}

static void begin_race(void *argument) {
    struct race *race = argument;
    race->member = (struct loop_member){join_posters, nothing, race, NULL, NULL};
    loop_join(race->loop, &race->member);
    for (int i = 0; i < THREADS; i++) {
        pthread_create(&race->threads[i], NULL, post_until_stopped, race);
    }
}

static void posts_that_race_with_the_stop_run_or_are_refused(void **state) {
    (void)state;
    static struct race race;
    assert_int_equal(meshx_loop_start(&race.loop), MESHX_OK);
    control_run(race.loop, begin_race, &race);
    while (atomic_load(&race.accepted) < POSTS) {
    }
    meshx_loop_stop(race.loop, 60000);
    assert_int_equal(atomic_load(&race.refused), THREADS);
    assert_int_equal(race.ran, atomic_load(&race.accepted));
}

struct thread_facts {
    char name[16];
    sigset_t blocked;
    bool elsewhere;
    pthread_t test;
};

static void look_around(void *argument) {
    struct thread_facts *facts = argument;
    pthread_getname_np(pthread_self(), facts->name, sizeof facts->name);
    pthread_sigmask(SIG_BLOCK, NULL, &facts->blocked);
    facts->elsewhere = !pthread_equal(pthread_self(), facts->test);
}

static void the_thread_has_a_name_and_takes_no_signals(void **state) {
    struct thread_facts facts = {.test = pthread_self()};
    sigset_t before;
    sigset_t after;
    pthread_sigmask(SIG_BLOCK, NULL, &before);
    struct meshx_loop *another;
    assert_int_equal(meshx_loop_start(&another), MESHX_OK);
    pthread_sigmask(SIG_BLOCK, NULL, &after);
    meshx_loop_stop(another, 0);

    control_run(*state, look_around, &facts);
    assert_true(facts.elsewhere);
    assert_string_equal(facts.name, "meshx_loop");
    for (int number = 1; number <= SIGRTMAX; number++) {
        assert_int_equal(sigismember(&before, number), sigismember(&after, number));
        bool reserved = number > 31 && number < SIGRTMIN;
        if (!reserved && number != SIGKILL && number != SIGSTOP) {
            assert_int_equal(sigismember(&facts.blocked, number), 1);
        }
    }
}

/* ---- members ---- */

struct actor {
    struct loop_member member;
    struct meshx_loop *loop;
    int stops;
    int abandons;
    int post_code;
    enum { LEAVES_AT_STOP, LEAVES_LATER, LEAVES_WHEN_ABANDONED } manner;
    struct actor *takes_along; /* leaves together with this one */
    struct loop_timer *timer;
};

static void leave(struct actor *actor) {
    loop_leave(actor->loop, &actor->member);
    if (actor->takes_along != NULL) {
        loop_leave(actor->loop, &actor->takes_along->member);
    }
}

static void leave_later(void *argument) {
    struct actor *actor = argument;
    loop_timer_free(actor->timer);
    leave(actor);
}

static void stop_actor(void *self) {
    struct actor *actor = self;
    actor->stops++;
    actor->post_code = loop_post(actor->loop, nothing, NULL);
    if (actor->manner == LEAVES_AT_STOP) {
        leave(actor);
    } else if (actor->manner == LEAVES_LATER) {
        assert_int_equal(loop_timer_new(actor->loop, leave_later, actor, &actor->timer),
                         MESHX_OK);
        loop_timer_start(actor->timer, 1);
    }
}

static void abandon_actor(void *self) {
    struct actor *actor = self;
    actor->abandons++;
    leave(actor);
}

static void join_actor(void *argument) {
    struct actor *actor = argument;
    actor->member = (struct loop_member){stop_actor, abandon_actor, actor, NULL, NULL};
    loop_join(actor->loop, &actor->member);
}

/* The last to join is the first to be told. */
static void run_actors(struct actor *actors, size_t count, uint32_t grace_ms) {
    struct meshx_loop *loop;
    assert_int_equal(meshx_loop_start(&loop), MESHX_OK);
    for (size_t i = 0; i < count; i++) {
        actors[i].loop = loop;
        control_run(loop, join_actor, &actors[i]);
    }
    meshx_loop_stop(loop, grace_ms);
}

static void members_are_told_to_stop_and_waited_for(void **state) {
    (void)state;
    struct actor actors[] = {{.manner = LEAVES_LATER},
                             {.manner = LEAVES_AT_STOP},
                             {.manner = LEAVES_LATER},
                             {.manner = LEAVES_AT_STOP}};
    run_actors(actors, 4, 600000);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(actors[i].stops, 1);
        assert_int_equal(actors[i].abandons, 0);
        assert_int_equal(actors[i].post_code, MESHX_ESTOPPED);
    }
}

static void members_left_after_the_grace_are_abandoned(void **state) {
    (void)state;
    struct actor actors[] = {{.manner = LEAVES_WHEN_ABANDONED},
                             {.manner = LEAVES_AT_STOP},
                             {.manner = LEAVES_WHEN_ABANDONED}};
    run_actors(actors, 3, 10);
    assert_int_equal(actors[0].stops, 1);
    assert_int_equal(actors[0].abandons, 1);
    assert_int_equal(actors[1].stops, 1);
    assert_int_equal(actors[1].abandons, 0);
    assert_int_equal(actors[2].abandons, 1);
}

static void a_member_may_take_others_along_as_it_leaves(void **state) {
    (void)state;
    struct actor actors[] = {{.manner = LEAVES_AT_STOP},
                             {.manner = LEAVES_AT_STOP},
                             {.manner = LEAVES_AT_STOP}};
    actors[2].takes_along = &actors[1]; /* the one that would be told next */
    run_actors(actors, 3, 600000);
    assert_int_equal(actors[2].stops, 1);
    assert_int_equal(actors[1].stops, 0);
    assert_int_equal(actors[0].stops, 1);

    struct actor abandoned[] = {{.manner = LEAVES_WHEN_ABANDONED},
                                {.manner = LEAVES_WHEN_ABANDONED}};
    abandoned[1].takes_along = &abandoned[0];
    run_actors(abandoned, 2, 0);
    assert_int_equal(abandoned[1].abandons, 1);
    assert_int_equal(abandoned[0].abandons, 0);
}

static void leave_actor(void *argument) {
    leave(argument);
}

static void a_member_that_left_is_not_told(void **state) {
    (void)state;
    struct meshx_loop *loop;
    assert_int_equal(meshx_loop_start(&loop), MESHX_OK);
    struct actor actors[3] = {{.loop = loop}, {.loop = loop}, {.loop = loop}};
    for (int i = 0; i < 3; i++) {
        control_run(loop, join_actor, &actors[i]);
    }
    control_run(loop, leave_actor, &actors[1]);
    meshx_loop_stop(loop, 600000);
    assert_int_equal(actors[0].stops, 1);
    assert_int_equal(actors[1].stops, 0);
    assert_int_equal(actors[2].stops, 1);
}

/* ---- timers ---- */

struct clock {
    struct meshx_loop *loop;
    struct loop_timer *timers[3];
    int fired[3];
    int order[8];
    int count;
    sem_t done;
};

static void note(struct clock *clock, int index) {
    clock->fired[index]++;
    clock->order[clock->count++] = index;
}

static void fire_first(void *argument) {
    note(argument, 0);
}

static void fire_second(void *argument) {
    struct clock *clock = argument;
    note(clock, 1);
    loop_timer_free(clock->timers[1]); /* its own */
    clock->timers[1] = NULL;
}

static void fire_last(void *argument) {
    struct clock *clock = argument;
    note(clock, 2);
    for (int i = 0; i < 3; i++) {
        loop_timer_free(clock->timers[i]);
    }
    sem_post(&clock->done);
}

static void make_timers(struct clock *clock) {
    assert_int_equal(loop_timer_new(clock->loop, fire_first, clock, &clock->timers[0]),
                     MESHX_OK);
    assert_int_equal(loop_timer_new(clock->loop, fire_second, clock, &clock->timers[1]),
                     MESHX_OK);
    assert_int_equal(loop_timer_new(clock->loop, fire_last, clock, &clock->timers[2]),
                     MESHX_OK);
}

static void start_timers(void *argument) {
    struct clock *clock = argument;
    make_timers(clock);
    loop_timer_start(clock->timers[2], 30);
    loop_timer_start(clock->timers[0], 20);
    loop_timer_start(clock->timers[1], 10);
}

static void timers_fire_once_and_by_delay(void **state) {
    struct clock clock = {.loop = *state};
    sem_init(&clock.done, 0, 0);
    uint64_t begin = loop_now();
    control_run(*state, start_timers, &clock);
    control_wait(&clock.done);
    assert_true(loop_now() - begin >= 29); /* libuv rounds to whole milliseconds */
    assert_int_equal(clock.count, 3);
    assert_int_equal(clock.order[0], 1);
    assert_int_equal(clock.order[1], 0);
    assert_int_equal(clock.order[2], 2);
}

static void restart_timers(void *argument) {
    struct clock *clock = argument;
    make_timers(clock);
    loop_timer_start(clock->timers[0], 0);
    loop_timer_stop(clock->timers[0]);
    loop_timer_start(clock->timers[1], 0);
    loop_timer_start(clock->timers[1], 600000); /* set anew: not now */
    loop_timer_start(clock->timers[2], 600000);
    loop_timer_start(clock->timers[2], 20);
    loop_timer_free(NULL);
}

static void timers_can_be_stopped_and_set_anew(void **state) {
    struct clock clock = {.loop = *state};
    sem_init(&clock.done, 0, 0);
    control_run(*state, restart_timers, &clock);
    control_wait(&clock.done);
    assert_int_equal(clock.count, 1);
    assert_int_equal(clock.fired[2], 1);
}

static void free_running_timer(void *argument) {
    struct clock *clock = argument;
    make_timers(clock);
    loop_timer_start(clock->timers[0], 0);
    loop_timer_free(clock->timers[0]);
    clock->timers[0] = NULL;
    loop_timer_start(clock->timers[2], 5);
}

static void a_freed_timer_does_not_fire(void **state) {
    struct clock clock = {.loop = *state};
    sem_init(&clock.done, 0, 0);
    control_run(*state, free_running_timer, &clock);
    control_wait(&clock.done);
    assert_int_equal(clock.count, 1);
}

static void post_from_loop(void *argument) {
    struct clock *clock = argument;
    assert_int_equal(loop_uv(clock->loop)->data, NULL);
    clock->fired[0] = loop_post(clock->loop, nothing, NULL);
}

static void the_control_thread_may_post_too(void **state) {
    struct clock clock = {.loop = *state, .fired = {MESHX_ESTOPPED}};
    control_run(*state, post_from_loop, &clock);
    assert_int_equal(clock.fired[0], MESHX_OK);
}

/* ---- what can go wrong ---- */

static void make_one_timer(void *argument) {
    struct clock *clock = argument;
    allocation_fail(1);
    clock->fired[0] = loop_timer_new(clock->loop, fire_first, clock, &clock->timers[0]);
    allocation_fail(0);
}

static void every_allocation_may_fail(void **state) {
    struct meshx_loop *loop = NULL;
    struct clock clock = {.loop = *state};
    allocation_fail(1);
    assert_int_equal(meshx_loop_start(&loop), MESHX_ENOMEM);
    assert_true(allocation_failed());
    assert_null(loop);
    allocation_fail(2); /* there is no second one */
    assert_int_equal(meshx_loop_start(&loop), MESHX_OK);
    assert_false(allocation_failed());
    allocation_fail(0);
    meshx_loop_stop(loop, 0);

    allocation_fail(1);
    assert_int_equal(loop_post(*state, nothing, NULL), MESHX_ENOMEM);
    assert_true(allocation_failed());
    control_run(*state, make_one_timer, &clock);
    assert_int_equal(clock.fired[0], MESHX_ENOMEM);
}

/* (libuv 1.44 itself leaks its epoll descriptor then, so that is not looked at.) */
static void without_descriptors_there_is_no_loop(void **state) {
    (void)state;
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    for (rlim_t spare = 0; spare < 2; spare++) {
        int lowest = dup(0);
        assert_true(lowest >= 0);
        close(lowest);
        struct rlimit tight = {(rlim_t)lowest + spare, limit.rlim_max};
        struct meshx_loop *loop = NULL;
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &tight), 0);
        int code = meshx_loop_start(&loop);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
        assert_int_equal(code, MESHX_ESYSTEM);
        assert_null(loop);
    }
}

static void without_a_thread_there_is_no_loop(void **state) {
    (void)state;
    pthread_attr_t usual;
    pthread_attr_t huge;
    struct meshx_loop *loop = NULL;
    assert_int_equal(pthread_getattr_default_np(&usual), 0);
    pthread_attr_init(&huge);
    pthread_attr_setstacksize(&huge, (size_t)1 << 47);
    assert_int_equal(pthread_setattr_default_np(&huge), 0);
    int code = meshx_loop_start(&loop);
    assert_int_equal(pthread_setattr_default_np(&usual), 0);
    assert_int_equal(code, MESHX_ESYSTEM);
    assert_null(loop);
    pthread_attr_destroy(&huge);
    pthread_attr_destroy(&usual);
}

int main(void) {
#define ON_LOOP(test) cmocka_unit_test_setup_teardown(test, start, stop)
    const struct CMUnitTest tests[] = {
        ON_LOOP(posts_of_one_thread_run_in_order),
        cmocka_unit_test(posts_of_many_threads_all_run_before_the_stop),
        cmocka_unit_test(posts_that_race_with_the_stop_run_or_are_refused),
        ON_LOOP(the_thread_has_a_name_and_takes_no_signals),
        cmocka_unit_test(members_are_told_to_stop_and_waited_for),
        cmocka_unit_test(members_left_after_the_grace_are_abandoned),
        cmocka_unit_test(a_member_may_take_others_along_as_it_leaves),
        cmocka_unit_test(a_member_that_left_is_not_told),
        ON_LOOP(timers_fire_once_and_by_delay),
        ON_LOOP(timers_can_be_stopped_and_set_anew),
        ON_LOOP(a_freed_timer_does_not_fire),
        ON_LOOP(the_control_thread_may_post_too),
        ON_LOOP(every_allocation_may_fail),
        cmocka_unit_test(without_descriptors_there_is_no_loop),
        cmocka_unit_test(without_a_thread_there_is_no_loop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
