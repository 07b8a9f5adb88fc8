/*
 * Timers: see timer.h. The owner's death closes the descriptor; if the term is collected
 * before that and nothing waits for it, the resource's end does.
 */
#include "timer.h"
#include <errno.h>
#include <sys/timerfd.h>
#include <unistd.h>

struct timer {
    int fd; /* -1: the owner has gone */
    ErlNifPid owner;
};

static ErlNifResourceType *timer_type;

static void on_destroy(ErlNifEnv *env, void *object) {
    struct timer *timer = object;

    (void)env;
    if (timer->fd >= 0) {
        close(timer->fd);
    }
}

static void on_stop(ErlNifEnv *env, void *object, ErlNifEvent fd, int is_direct_call) {
    (void)env;
    (void)object;
    (void)is_direct_call;
    close(fd);
}

static void on_down(ErlNifEnv *env, void *object, ErlNifPid *pid,
                    ErlNifMonitor *monitor) {
    struct timer *timer = object;
    int fd = timer->fd;

    (void)pid;
    (void)monitor;
    timer->fd = -1; /* nobody else may use it */
    int stopped = enif_select(env, fd, ERL_NIF_SELECT_STOP, timer, NULL, am_undefined);
    if (stopped < 0 ||
        (stopped & (ERL_NIF_SELECT_STOP_CALLED | ERL_NIF_SELECT_STOP_SCHEDULED)) == 0) {
        close(fd); /* no stop callback comes */
    }
}

bool timer_open_type(ErlNifEnv *env, ErlNifResourceFlags flags) {
    ErlNifResourceTypeInit callbacks = {
        .dtor = on_destroy, .stop = on_stop, .down = on_down};

    timer_type = enif_open_resource_type_x(env, "meshx_timer", &callbacks, flags, NULL);
    return timer_type != NULL;
}

/* timer() -> {ok, Timer} | {error, Posix} */
ERL_NIF_TERM nif_timer(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct timer *timer;
    ERL_NIF_TERM result;
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);

    (void)argc;
    (void)argv;
    if (fd < 0) {
        return terms_error_errno(env, errno);
    }
    timer = enif_alloc_resource(timer_type, sizeof *timer);
    if (timer == NULL) {
        close(fd);
        return terms_error_errno(env, ENOMEM);
    }
    timer->fd = fd;
    enif_self(env, &timer->owner);
    result = enif_monitor_process(env, timer, &timer->owner, NULL) == 0
                 ? enif_make_tuple2(env, am_ok, enif_make_resource(env, timer))
                 : terms_error_errno(env, ESRCH);
    enif_release_resource(timer); /* the term keeps it, or it is destroyed here */
    return result;
}

/* timer_start(Timer, Microseconds) -> ok | {error, Posix}. {select, Timer, undefined,
 * ready_input} follows. For its owner only. */
ERL_NIF_TERM nif_timer_start(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct itimerspec time = {0};
    unsigned microseconds;
    ErlNifPid self;
    void *object;

    (void)argc;
    if (!enif_get_resource(env, argv[0], timer_type, &object) ||
        !enif_get_uint(env, argv[1], &microseconds) || microseconds == 0) {
        return enif_make_badarg(env);
    }
    struct timer *timer = object;
    if (enif_compare_pids(enif_self(env, &self), &timer->owner) != 0) {
        return enif_make_badarg(env);
    }
    time.it_value.tv_sec = microseconds / 1000000;
    time.it_value.tv_nsec = (long)(microseconds % 1000000) * 1000;
    if (timerfd_settime(timer->fd, 0, &time, NULL) < 0) {
        return terms_error_errno(env, errno);
    }
    if (enif_select(env, timer->fd, ERL_NIF_SELECT_READ, timer, NULL, am_undefined) < 0) {
        return terms_error_errno(env, ENOMEM);
    }
    return am_ok;
}
