/*
 * The sidecar module on the real loop with the real guard (MESHX_GUARD) and small real
 * commands. All tests run twice: with SIGCHLD ignored, as in an Erlang VM, and default.
 */
#include "support.h"

#include "agent.h"
#include "process.h"
#include "runner.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* Start and end */

static void reports_start_output_and_end(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner, "echo out; echo err >&2; exit 3");
    runner_expect_started(runner);
    struct event event = runner_expect(runner, OUTPUT);
    struct event other = runner_expect(runner, OUTPUT);
    if (event.stream == MESHX_STDERR) { /* the order of two pipes is not defined */
        struct event swap = event;
        event = other;
        other = swap;
    }
    assert_int_equal(event.stream, MESHX_STDOUT);
    assert_string_equal(event.line, "out");
    assert_int_equal(other.stream, MESHX_STDERR);
    assert_string_equal(other.line, "err");
    event = runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "");
    assert_string_equal(event.failure.text,
                        "sidecar /bin/sh (sidecar_command) exited with status 3: err");
    assert_int_equal(event.restart_ms, 60000);
}

static void names_the_last_error_line(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner,
                       "echo first >&2; echo '==> Error preparing configuration' >&2;"
                       "echo >&2; echo ' ' >&2; exit 1");
    runner_expect_started(runner);
    for (int i = 0; i < 4; i++) {
        runner_expect(runner, OUTPUT);
    }
    runner_expect_ended(runner, MESHX_ESIDECAR_EXITED,
                        "exited with status 1: ==> Error preparing configuration");
}

static void forgets_the_error_line_of_the_run_before(void **state) {
    struct runner *runner = *state;
    char *directory = agent_make_directory();
    char script[512];
    snprintf(script, sizeof script,
             "mkdir %s/second 2> /dev/null && echo oops >&2; exit 1", directory);
    runner_start_shell(runner, script);
    runner_expect_started(runner);
    runner_expect_line(runner, "oops");
    runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "oops");
    runner_call(runner, runner_restart_now); /* this time there is nothing to say */
    runner_expect_started(runner);
    struct event event = runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "");
    assert_string_equal(event.failure.text,
                        "sidecar /bin/sh (sidecar_command) exited with status 1");
    agent_remove_directory(directory);
}

static void reports_death_by_signal(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner, "kill -9 $$");
    runner_expect_started(runner);
    struct event event = runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "");
    assert_string_equal(event.failure.text,
                        "sidecar /bin/sh (sidecar_command) was killed by signal 9");
}

static void reports_a_command_that_cannot_be_executed(void **state) {
    struct runner *runner = *state;
    const char *missing[] = {"no-such-sidecar", NULL};
    const char *forbidden[] = {"/etc/passwd", NULL};
    runner_start(runner, missing);
    runner_expect_ended(runner, MESHX_ESIDECAR_COMMAND,
                        "no-such-sidecar is not found in PATH; install it");
    runner_call(runner, runner_free_now);
    runner_start(runner, forbidden);
    struct event event =
        runner_expect_ended(runner, MESHX_ESIDECAR_COMMAND, "/etc/passwd");
    assert_non_null(strstr(event.failure.text, strerror(EACCES)));
}

static void reports_a_missing_guard(void **state) {
    struct runner *runner = *state;
    runner->config.guard_path = "/nonexistent/meshx_guard";
    runner_start_shell(runner, "true");
    struct event event =
        runner_expect_ended(runner, MESHX_ESYSTEM, "/nonexistent/meshx_guard");
    assert_non_null(strstr(event.failure.text, strerror(ENOENT)));
    assert_int_equal(event.restart_ms, 60000);
    runner_stop(runner);
}

static void reports_a_guard_that_died(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner, "echo $PPID; exec sleep 1000");
    pid_t sidecar = runner_expect_started(runner);
    pid_t guard = runner_expect_pid_line(runner);
    assert_int_equal(kill(guard, SIGKILL), 0);
    runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "guard died");
    assert_true(process_wait_gone(sidecar));
}

/* A program in the guard's place. */
static char *make_script(const char *directory, const char *text) {
    char *path = NULL;
    assert_true(asprintf(&path, "%s/script", directory) > 0);
    char new_path[256];
    snprintf(new_path, sizeof new_path, "%s.new", path);
    FILE *file = fopen(new_path, "we");
    assert_non_null(file);
    assert_true(fprintf(file, "#!/bin/sh\n%s\n", text) > 0);
    assert_int_equal(fchmod(fileno(file), 0755), 0);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(rename(new_path, path), 0); /* all of it appears at once */
    return path;
}

static void gives_up_a_guard_that_talks_nonsense(void **state) {
    struct runner *runner = *state;
    char *directory = agent_make_directory();
    char *path = make_script(directory, "printf 'nonsense' >&3; read end <&3");
    runner->config.guard_path = path;
    runner_start_shell(runner, "true");
    runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "guard died");
    runner_stop(runner);
    free(path);
    agent_remove_directory(directory);
}

/* What it inherits */

static void passes_environment_signals_and_descriptors(void **state) {
    struct runner *runner = *state;
    const char *environment[] = {"A=1 2", "PATH=/usr/bin:/bin", "B=", NULL};
    const char *command[] = {"env", NULL};
    runner->config.environment = environment;
    runner_start(runner, command);
    runner_expect_started(runner);
    for (size_t i = 0; environment[i] != NULL; i++) {
        runner_expect_line(runner, environment[i]);
    }
    runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "status 0");
    runner_call(runner, runner_free_now);

    int stray = open("/dev/zero", O_RDONLY); /* not CLOEXEC */
    runner_start_shell(runner, "ls /proc/$$/fd; echo $PPID; "
                               "exec grep -E '^Sig(Blk|Ign)' /proc/self/status");
    runner_expect_started(runner);
    runner_expect_line(runner, "0");
    runner_expect_line(runner, "1");
    runner_expect_line(runner, "2");
    runner_expect_pid_line(runner);
    runner_expect_line(runner, "SigBlk:\t0000000000000000");
    /* glibc's posix_spawn leaves its own two, 32 and 33, ignored in every child. */
    struct event event = runner_expect(runner, OUTPUT);
    assert_memory_equal(event.line, "SigIgn:\t", 8);
    assert_true((strtoull(event.line + 8, NULL, 16) & ~(3ULL << 31)) == 0);
    runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "status 0");
    close(stray);
}

static void guard_is_in_a_session_of_its_own(void **state) {
    struct runner *runner = *state;
    int stray = open("/dev/zero", O_RDONLY);
    runner_start_shell(runner, "echo $PPID; exec sleep 1000");
    pid_t sidecar = runner_expect_started(runner);
    pid_t guard = runner_expect_pid_line(runner);
    assert_int_equal(getsid(guard), guard);
    assert_int_equal(getpgid(sidecar), sidecar);
    /* 0-3, signalfd, two pipes. Only root may look: it is not dumpable. */
    assert_int_equal(process_descriptors(guard), geteuid() == 0 ? 7 : -1);
    close(stray);
    runner_stop(runner);
}

/* Output */

static void delivers_all_of_a_burst_in_order(void **state) {
    struct runner *runner = *state;
    runner->numbers = 1;
    runner_start_shell(runner, "seq 1 20000");
    runner_expect_started(runner);
    runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "status 0");
    assert_int_equal(runner->misses, 0);
    assert_int_equal(runner->numbers, 20001);
}

static void delivers_the_longest_line(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner, "head -c 4100 /dev/zero | tr '\\0' x; printf 'a\\0b\\n'");
    runner_expect_started(runner);
    assert_int_equal(strlen(runner_expect(runner, OUTPUT).line), 4096);
    runner_expect_line(runner, "xxxxa b");
    runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "status 0");
}

/* Restarts */

/* There may be some more of them before it stops. */
static void stop_between_restarts(struct runner *runner) {
    runner_call(runner, runner_stop_now);
    while (runner_next(runner).type != STOPPED) {
    }
}

static void back_off_doubles_up_to_the_maximum(void **state) {
    struct runner *runner = *state;
    const char *missing[] = {"no-such-sidecar", NULL};
    static const uint32_t expected[] = {1, 2, 4, 8, 9, 9};
    runner->config.restart_min = 1;
    runner->config.restart_max = 9;
    runner_start(runner, missing);
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        struct event event =
            runner_expect_ended(runner, MESHX_ESIDECAR_COMMAND, "no-such");
        assert_int_equal(event.restart_ms, expected[i]);
    }
    stop_between_restarts(runner);
    runner_call(runner, runner_start_now); /* begins anew */
    assert_int_equal(runner_expect(runner, ENDED).restart_ms, 1);
    assert_int_equal(runner_expect(runner, ENDED).restart_ms, 2);
    stop_between_restarts(runner);
}

static void back_off_is_reset_by_a_long_run(void **state) {
    struct runner *runner = *state;
    char *directory = agent_make_directory();
    char *path = NULL;
    assert_true(asprintf(&path, "%s/script", directory) > 0);
    const char *command[] = {path, NULL};
    runner->config.restart_min = 3;
    runner->config.restart_max = 12;
    runner_start(runner, command);
    assert_int_equal(runner_expect(runner, ENDED).restart_ms, 3);
    assert_int_equal(runner_expect(runner, ENDED).restart_ms, 6);
    free(make_script(directory, "sleep 0.1"));
    while (runner_next(runner).type != STARTED) { /* perhaps some more in vain */
    }
    for (int i = 0; i < 2; i++) {
        struct event event =
            runner_expect_ended(runner, MESHX_ESIDECAR_EXITED, "status 0");
        assert_int_equal(event.restart_ms, 3);
        runner_expect_started(runner);
    }
    stop_between_restarts(runner);
    free(path);
    agent_remove_directory(directory);
}

static void restarts_on_request(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner,
                       "trap 'echo bye; exit 0' TERM; echo ready; sleep 1000 & wait");
    pid_t before = runner_expect_started(runner);
    runner_expect_line(runner, "ready");
    runner_call(runner, runner_restart_now);
    runner_expect_line(runner, "bye");
    pid_t after = runner_expect_started(runner); /* ENDED is for what nobody asked for */
    assert_false(process_runs(before));
    assert_int_not_equal(before, after);
    runner_expect_line(runner, "ready");
    runner_call(runner, runner_restart_now);
    runner_call(runner, runner_restart_now); /* once more changes nothing */
    runner_expect_line(runner, "bye");
    runner_expect_started(runner);
    runner_expect_line(runner, "ready");
    runner_call(runner, runner_stop_now);
    runner_expect_line(runner, "bye");
    runner_expect(runner, STOPPED);
}

static void restarts_at_once_while_it_waits(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner, "exit 1");
    runner_expect_started(runner);
    assert_int_equal(runner_expect(runner, ENDED).restart_ms, 60000);
    runner_call(runner, runner_restart_now);
    runner_expect_started(runner);
    runner_expect(runner, ENDED);
}

static void restarts_nothing_that_is_not_started(void **state) {
    struct runner *runner = *state;
    const char *command[] = {"true", NULL};
    runner_make(runner, command);
    runner_call(runner, runner_restart_now);
    runner_stop(runner);
    runner_call(runner, runner_restart_now);
    runner_expect_silence(runner);
}

/* Stopping */

static void stops_a_running_one(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner, "exec sleep 1000");
    pid_t sidecar = runner_expect_started(runner);
    runner_call(runner, runner_start_now); /* it is: changes nothing */
    runner_stop(runner);
    assert_false(process_runs(sidecar));
    runner_expect_silence(runner);
}

static void stops_while_it_waits_for_a_restart(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner, "exit 1");
    runner_expect_started(runner);
    runner_expect(runner, ENDED);
    runner_stop(runner);
    runner_expect_silence(runner);
}

static void stops_while_it_restarts(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner,
                       "trap 'echo bye; exit 0' TERM; echo ready; sleep 1000 & wait");
    runner_expect_started(runner);
    runner_expect_line(runner, "ready");
    runner_call(runner, runner_restart_now);
    runner_call(runner, runner_stop_now);
    runner_call(runner, runner_restart_now); /* too late */
    runner_expect_line(runner, "bye");
    runner_expect(runner, STOPPED);
    runner_expect_silence(runner);
}

/* Of one turn of the loop: to stop what has stopped is another stop. */
static void do_stop_twice(void *argument) {
    runner_stop_now(argument);
    runner_stop_now(argument);
}

static void do_start_and_stop(void *argument) {
    runner_start_now(argument);
    do_stop_twice(argument);
}

static void stops_once_and_starts_again(void **state) {
    struct runner *runner = *state;
    const char *command[] = {"sleep", "1000", NULL};
    runner_make(runner, command);
    runner_stop(runner); /* never started */
    runner_call(runner, do_start_and_stop);
    runner_expect(runner, STOPPED);
    runner_call(runner, runner_start_now);
    runner_expect_started(runner);
    runner_call(runner, do_stop_twice);
    runner_expect(runner, STOPPED);
    runner_call(runner, runner_start_now);
    runner_expect_started(runner);
    runner_stop(runner);
}

static void stops_what_ignores_term(void **state) {
    struct runner *runner = *state;
    runner->config.stop_timeout = 50;
    runner_start_shell(runner, "trap '' TERM; echo ready; sleep 1000; sleep 1000");
    pid_t sidecar = runner_expect_started(runner);
    runner_expect_line(runner, "ready");
    runner_stop(runner);
    assert_false(process_runs(sidecar));
}

/* A guard that neither ends nor closes its socket. */
static void kills_a_guard_that_does_not_end(void **state) {
    struct runner *runner = *state;
    char *directory = agent_make_directory();
    char *path = make_script(
        directory, "printf '\\004\\000\\000\\000\\006%06d' $$ >&3; exec sleep 1000");
    runner->config.guard_path = path;
    runner->config.stop_timeout = 1;
    runner_start_shell(runner, "true");
    pid_t guard = runner_expect_pid_line(runner);
    runner_call(runner, runner_restart_now);
    pid_t second_guard = runner_expect_pid_line(runner);
    assert_true(process_wait_gone(guard));
    runner_stop(runner);
    assert_true(process_wait_gone(second_guard));
    free(path);
    agent_remove_directory(directory);
}

static void replaces_a_guard_that_hangs(void **state) {
    struct runner *runner = *state;
    runner->config.stop_timeout = 50;
    runner_start_shell(runner, "echo $PPID; exec sleep 1000");
    pid_t sidecar = runner_expect_started(runner);
    pid_t guard = runner_expect_pid_line(runner);
    assert_int_equal(kill(guard, SIGSTOP), 0);
    runner_call(runner, runner_restart_now);
    pid_t second = runner_expect_started(runner);
    assert_int_not_equal(second, sidecar);
    assert_true(process_wait_gone(guard));
    assert_true(process_wait_gone(sidecar));
    runner_expect_pid_line(runner);
    runner_stop(runner);
    assert_false(process_runs(second));
}

/* Freeing */

static void frees_while_it_runs(void **state) {
    struct runner *runner = *state;
    runner_start_shell(runner,
                       "trap 'echo bye; exit 0' TERM; echo ready; sleep 1000 & wait");
    pid_t sidecar = runner_expect_started(runner);
    runner_expect_line(runner, "ready");
    runner_call(runner, runner_free_now);
    assert_true(process_wait_gone(sidecar));
    runner_expect_silence(runner);
}

static void frees_at_any_state(void **state) {
    struct runner *runner = *state;
    const char *command[] = {"sleep", "1000", NULL};
    runner_make(runner, command);
    runner_call(runner, runner_free_now); /* idle */
    runner_start(runner, command);
    runner_call(runner, runner_free_now); /* at some moment of the start */
    runner_start(runner, command);
    pid_t sidecar = runner_expect_started(runner);
    runner_call(runner, runner_stop_now);
    runner_call(runner, runner_free_now); /* stopping */
    assert_true(process_wait_gone(sidecar));
    runner_start(runner, command);
    sidecar = runner_expect_started(runner);
    runner_call(runner, runner_restart_now);
    runner_call(runner, runner_free_now); /* restarting */
    assert_true(process_wait_gone(sidecar));
    runner_start_shell(runner, "exit 1");
    runner_expect_started(runner);
    runner_expect(runner, ENDED);
    runner_call(runner, runner_free_now); /* waiting */
    runner_call(runner, runner_free_now); /* NULL */
    pthread_mutex_lock(&runner->lock);
    runner->count = 0; /* the second may have got as far as STARTED */
    pthread_mutex_unlock(&runner->lock);
}

static void frees_in_every_callback(void **state) {
    struct runner *runner = *state;
    runner->frees = true;
    for (int type = STARTED; type <= STOPPED; type++) {
        runner->frees_at = (enum event_type)type;
        runner_start_shell(runner, "echo one; echo two; exit 1");
        struct event event;
        while ((event = runner_next(runner)).type != runner->frees_at) {
            if (event.type == ENDED) {
                runner_call(runner, runner_stop_now);
            }
        }
        runner_expect_silence(runner);
    }
    const char *missing[] = {"no-such-sidecar", NULL};
    runner->frees_at = ENDED;
    runner_start(runner, missing);
    runner_expect_ended(runner, MESHX_ESIDECAR_COMMAND, "no-such-sidecar");
    runner->config.guard_path = "/nonexistent";
    runner_start(runner, missing);
    runner_expect_ended(runner, MESHX_ESYSTEM, "/nonexistent");
    runner_expect_silence(runner);
}

/* Failures of our own */

static unsigned failing;

static void do_new_and_start_failing(void *argument) {
    struct runner *runner = argument;
    allocation_fail(failing);
    runner_new_now(runner);
    if (runner->result == MESHX_OK) {
        sidecar_start(runner->sidecar);
    }
}

static void survives_every_failed_allocation(void **state) {
    struct runner *runner = *state;
    const char *command[] = {"sleep", "1000", NULL};
    runner->config.command = command;
    runner->config.restart_min = 1;
    unsigned refused = 0;
    unsigned late = 0;
    bool done = false;
    for (failing = 1; !done; failing++) {
        runner->sidecar = NULL;
        runner_call(runner, do_new_and_start_failing);
        if (runner->result != MESHX_OK) {
            assert_int_equal(runner->result, MESHX_ENOMEM);
            assert_null(runner->sidecar);
            refused++;
            continue;
        }
        struct event event = runner_next(runner);
        if (event.type == ENDED) {
            assert_int_equal(event.failure.code, MESHX_ENOMEM);
            late++;
            event = runner_next(runner);
        }
        assert_int_equal(event.type, STARTED);
        done = !allocation_failed();
        allocation_fail(0);
        runner_stop(runner);
        runner_call(runner, runner_free_now);
    }
    assert_int_equal(late, 1);
    assert_true(refused >= 8);
}

static void reports_a_lack_of_descriptors(void **state) {
    struct runner *runner = *state;
    const char *command[] = {"sleep", "1000", NULL};
    runner->config.restart_min = 10;
    runner->config.restart_max = 10;
    runner_make(runner, command);
    int taken[4096];
    size_t count = 0;
    while (count < 4096 && (taken[count] = dup(STDIN_FILENO)) >= 0) {
        count++;
    }
    assert_true(count > 2 && count < 4096); /* main() has set the limit */
    runner_call(runner, runner_start_now);
    runner_expect_ended(runner, MESHX_ESYSTEM, strerror(EMFILE));
    close(taken[--count]); /* one is not enough for a pair */
    runner_expect_ended(runner, MESHX_ESYSTEM, strerror(EMFILE));
    while (count > 0) {
        close(taken[--count]);
    }
    struct event event;
    while ((event = runner_next(runner)).type == ENDED) { /* until it is tried again */
    }
    assert_int_equal(event.type, STARTED);
    runner_stop(runner);
}

/* The real thing */

static void names_what_consul_says(void **state) {
    struct runner *runner = *state;
    const char *consul = getenv("MESHX_CONSUL");
    if (consul == NULL) {
        consul = "_build/consul/usr/bin/consul";
    }
    if (access(consul, X_OK) != 0) {
        skip();
    }
    struct agent *agent;
    char address[128];
    agent_start(&agent);
    snprintf(address, sizeof address, "CONSUL_HTTP_ADDR=%s", agent_address(agent));
    const char *environment[] = {address, NULL};
    const char *command[] = {consul, "connect", "proxy", "-sidecar-for", "nobody", NULL};
    runner->config.environment = environment;
    runner_start(runner, command);
    runner_expect_started(runner);
    struct event event;
    while ((event = runner_next(runner)).type == OUTPUT) {
    }
    assert_int_equal(event.type, ENDED);
    assert_int_equal(event.failure.code, MESHX_ESIDECAR_EXITED);
    assert_non_null(strstr(event.failure.text, "exited with status 1: "));
    assert_non_null(strstr(event.failure.text, "No sidecar proxy registered"));
    agent_stop(agent);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, runner_set_up, runner_tear_down)

static int run_all(const char *group) {
    const struct CMUnitTest tests[] = {
        TEST(reports_start_output_and_end),
        TEST(names_the_last_error_line),
        TEST(forgets_the_error_line_of_the_run_before),
        TEST(reports_death_by_signal),
        TEST(reports_a_command_that_cannot_be_executed),
        TEST(reports_a_missing_guard),
        TEST(reports_a_guard_that_died),
        TEST(gives_up_a_guard_that_talks_nonsense),
        TEST(passes_environment_signals_and_descriptors),
        TEST(guard_is_in_a_session_of_its_own),
        TEST(delivers_all_of_a_burst_in_order),
        TEST(delivers_the_longest_line),
        TEST(back_off_doubles_up_to_the_maximum),
        TEST(back_off_is_reset_by_a_long_run),
        TEST(restarts_on_request),
        TEST(restarts_at_once_while_it_waits),
        TEST(restarts_nothing_that_is_not_started),
        TEST(stops_a_running_one),
        TEST(stops_while_it_waits_for_a_restart),
        TEST(stops_while_it_restarts),
        TEST(stops_once_and_starts_again),
        TEST(stops_what_ignores_term),
        TEST(kills_a_guard_that_does_not_end),
        TEST(replaces_a_guard_that_hangs),
        TEST(frees_while_it_runs),
        TEST(frees_at_any_state),
        TEST(frees_in_every_callback),
        TEST(survives_every_failed_allocation),
        TEST(reports_a_lack_of_descriptors),
        TEST(names_what_consul_says),
    };
    return cmocka_run_group_tests_name(group, tests, NULL, NULL);
}

int main(void) {
    if (getenv("MESHX_GUARD") == NULL) {
        fputs("MESHX_GUARD must name the guard program\n", stderr);
        return 1;
    }
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = 256;
    setrlimit(RLIMIT_NOFILE, &limit);
    (void)signal(SIGCHLD, SIG_IGN);
    int failures = run_all("SIGCHLD ignored, as in the VM");
    (void)signal(SIGCHLD, SIG_DFL);
    failures += run_all("SIGCHLD default");
    while (waitpid(-1, NULL, WNOHANG) > 0) { /* the guards of the second group */
    }
    return failures;
}
