/*
 * The agent is forked from the test (one exec follows, only async-signal-safe calls in
 * between, so threads and sanitizers do not mind) and waited for by its own pid. A port
 * the kernel gave may be taken by someone else before Consul binds it, so a start that
 * ends early is tried again with other ports.
 */
#include "agent.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PORT_HTTP, PORT_GRPC, PORT_SERVER, PORT_SERF, PORT_COUNT };
enum { START_TRIES = 5, START_SECONDS = 60 };

struct agent {
    pid_t pid; /* 0: does not run */
    uint16_t ports[PORT_COUNT];
    char address[32];
    char url[40];
    char *directory;
    char *config;
    char *token;
    bool keeps_state;
};

static void pause_ms(long milliseconds) {
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static time_t seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec;
}

static struct sockaddr_in loopback(uint16_t port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

/* Binds port 0 for TCP and the same port for UDP, which serf needs too. */
static bool bind_both(int sockets[2], uint16_t *port) {
    struct sockaddr_in address = loopback(0);
    socklen_t size = sizeof address;
    sockets[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockets[1] = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (bind(sockets[0], (struct sockaddr *)&address, sizeof address) != 0 ||
        getsockname(sockets[0], (struct sockaddr *)&address, &size) != 0) {
        return false;
    }
    *port = ntohs(address.sin_port);
    return bind(sockets[1], (struct sockaddr *)&address, sizeof address) == 0;
}

/* All ports are held at once, so that they differ from each other. */
static void choose_ports(uint16_t *ports, size_t count) {
    int held[PORT_COUNT][2];
    for (size_t i = 0; i < count; i++) {
        while (!bind_both(held[i], &ports[i])) {
            close(held[i][0]);
            close(held[i][1]);
        }
    }
    for (size_t i = 0; i < count; i++) {
        close(held[i][0]);
        close(held[i][1]);
    }
}

uint16_t agent_free_port(void) {
    uint16_t port = 0;
    choose_ports(&port, 1);
    return port;
}

char *agent_make_directory(void) {
    const char *parent = getenv("TMPDIR");
    char *directory = NULL;
    if (asprintf(&directory, "%s/meshx_test_XXXXXX", parent != NULL ? parent : "/tmp") <
            0 ||
        mkdtemp(directory) == NULL) {
        fail_msg("mkdtemp: %s", strerror(errno));
    }
    return directory;
}

static int remove_entry(const char *path, const struct stat *status, int type,
                        struct FTW *position) {
    (void)status;
    (void)type;
    (void)position;
    return remove(path);
}

void agent_remove_directory(char *directory) {
    if (directory != NULL) {
        nftw(directory, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
        free(directory);
    }
}

const char *agent_binary(void) {
    static char absolute[PATH_MAX];
    const char *path = getenv("MESHX_CONSUL");
    if (path == NULL || path[0] == '\0') {
        path = "_build/consul/usr/bin/consul";
    }
    if (realpath(path, absolute) == NULL) {
        fail_msg("%s: %s; `make consul` provides it", path, strerror(errno));
    }
    return absolute;
}

/* Consul >= 1.14 opens one more port, which older ones do not know how to close. */
static bool has_grpc_tls_port(void) {
    char command[PATH_MAX + 64];
    snprintf(command, sizeof command, "'%s' agent -help 2>&1 | grep -q grpc-tls-port",
             agent_binary());
    return system(command) == 0; // NOLINT(cert-env33-c,concurrency-mt-unsafe)
}

static void choose_own_ports(struct agent *agent) {
    choose_ports(agent->ports, PORT_COUNT);
    snprintf(agent->address, sizeof agent->address, "127.0.0.1:%u",
             agent->ports[PORT_HTTP]);
    snprintf(agent->url, sizeof agent->url, "http://%s", agent->address);
}

static void spawn(struct agent *agent) {
    char http[32], grpc[32], server[32], serf[32], data[256], log[256];
    snprintf(http, sizeof http, "-http-port=%u", agent->ports[PORT_HTTP]);
    snprintf(grpc, sizeof grpc, "-grpc-port=%u", agent->ports[PORT_GRPC]);
    snprintf(server, sizeof server, "-server-port=%u", agent->ports[PORT_SERVER]);
    snprintf(serf, sizeof serf, "-serf-lan-port=%u", agent->ports[PORT_SERF]);
    snprintf(data, sizeof data, "-data-dir=%s/data", agent->directory);
    snprintf(log, sizeof log, "%s/log", agent->directory);
    const char *argv[24] = {agent_binary(),
                            "agent",
                            "-node=meshx-test",
                            "-bind=127.0.0.1",
                            "-client=127.0.0.1",
                            "-dns-port=-1",
                            "-serf-wan-port=-1",
                            "-log-level=info",
                            http,
                            grpc,
                            server,
                            serf,
                            "-hcl",
                            agent->config};
    size_t argc = 14;
    if (has_grpc_tls_port()) {
        argv[argc++] = "-grpc-tls-port=-1";
    }
    if (agent->keeps_state) {
        argv[argc++] = "-server";
        argv[argc++] = "-bootstrap-expect=1";
        argv[argc++] = "-hcl";
        argv[argc++] = "connect { enabled = true } performance { raft_multiplier = 1 }";
        argv[argc++] = data;
    } else {
        argv[argc++] = "-dev";
    }
    int output = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    pid_t parent = getpid();
    sigset_t none;
    sigemptyset(&none);
    agent->pid = fork();
    if (agent->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) {
            _exit(1);
        }
        sigprocmask(SIG_SETMASK, &none, NULL);
        dup2(output, STDOUT_FILENO);
        dup2(output, STDERR_FILENO);
        execv(argv[0], (char *const *)argv);
        _exit(127);
    }
    int error_number = errno;
    close(output);
    if (agent->pid < 0) {
        agent->pid = 0;
        fail_msg("fork: %s", strerror(error_number));
    }
}

static bool runs(struct agent *agent) {
    if (agent->pid != 0 && waitpid(agent->pid, NULL, WNOHANG) == agent->pid) {
        agent->pid = 0;
    }
    return agent->pid != 0;
}

static bool ready(const struct agent *agent) {
    char *leader = NULL;
    bool is_ready =
        agent_request(agent, "GET", "/v1/status/leader", NULL, &leader) == 200 &&
        strlen(leader) > 2 &&
        agent_request(agent, "GET", "/v1/agent/connect/ca/roots", NULL, NULL) == 200;
    free(leader);
    return is_ready;
}

/* True when it is ready, false when it has ended. */
static bool wait_ready(struct agent *agent) {
    time_t deadline = seconds() + START_SECONDS;
    while (runs(agent)) {
        if (ready(agent)) {
            return true;
        }
        if (seconds() > deadline) {
            break;
        }
        pause_ms(20);
    }
    return false;
}

static void show_log(const struct agent *agent) {
    char path[256], line[1024];
    snprintf(path, sizeof path, "%s/log", agent->directory);
    FILE *log = fopen(path, "re");
    while (log != NULL && fgets(line, sizeof line, log) != NULL) {
        print_error("%s", line);
    }
    if (log != NULL) {
        fclose(log);
    }
}

static char *copy(const char *text) {
    char *result = strdup(text);
    assert_non_null(result);
    return result;
}

void agent_start_with(const struct agent_options *options, struct agent **out) {
    struct agent *agent = calloc(1, sizeof *agent);
    assert_non_null(agent);
    agent->directory = agent_make_directory();
    agent->config = copy(options != NULL && options->config ? options->config : "");
    agent->token = options != NULL && options->token ? copy(options->token) : NULL;
    agent->keeps_state = options != NULL && options->keeps_state;
    for (int i = 0; i < START_TRIES; i++) {
        choose_own_ports(agent);
        spawn(agent);
        if (wait_ready(agent)) {
            *out = agent;
            return;
        }
        agent_kill(agent);
    }
    show_log(agent);
    agent_stop(agent);
    fail_msg("%s does not start; its log is above", agent_binary());
}

void agent_start(struct agent **out) {
    agent_start_with(NULL, out);
}

const char *agent_url(const struct agent *agent) {
    return agent->url;
}

const char *agent_address(const struct agent *agent) {
    return agent->address;
}

uint16_t agent_port(const struct agent *agent) {
    return agent->ports[PORT_HTTP];
}

uint16_t agent_grpc_port(const struct agent *agent) {
    return agent->ports[PORT_GRPC];
}

const char *agent_directory(const struct agent *agent) {
    return agent->directory;
}

static void end(struct agent *agent, int signal_number) {
    if (agent->pid != 0) {
        kill(agent->pid, signal_number);
        kill(agent->pid, SIGCONT);
        while (waitpid(agent->pid, NULL, 0) < 0 && errno == EINTR) {
        }
        agent->pid = 0;
    }
}

void agent_kill(struct agent *agent) {
    end(agent, SIGKILL);
}

void agent_restart(struct agent *agent) {
    agent_kill(agent);
    /* Its port may be in use for a moment, by an outgoing connection of someone else. */
    for (int i = 0; i < START_TRIES; i++) {
        spawn(agent);
        if (wait_ready(agent)) {
            return;
        }
        agent_kill(agent);
        pause_ms(200);
    }
    show_log(agent);
    fail_msg("the agent does not start again at %s", agent->address);
}

void agent_freeze(struct agent *agent) {
    int status = 0;
    assert_int_equal(kill(agent->pid, SIGSTOP), 0);
    /* Its threads go on for a moment; the parent is told when the last has stopped. */
    assert_int_equal(waitpid(agent->pid, &status, WUNTRACED), agent->pid);
    assert_true(WIFSTOPPED(status));
}

void agent_thaw(struct agent *agent) {
    assert_int_equal(kill(agent->pid, SIGCONT), 0);
}

void agent_stop(struct agent *agent) {
    if (agent != NULL) {
        /* Nothing in it is worth an orderly end, which takes Consul seconds. */
        end(agent, SIGKILL);
        agent_remove_directory(agent->directory);
        free(agent->config);
        free(agent->token);
        free(agent);
    }
}

static bool write_all(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t count = send(fd, data, size, MSG_NOSIGNAL);
        if (count <= 0) {
            return false;
        }
        data += count;
        size -= (size_t)count;
    }
    return true;
}

/* Everything until the far side closes, NUL-terminated; new. */
static char *read_all(int fd) {
    size_t size = 0;
    size_t capacity = 65536;
    char *data = malloc(capacity);
    assert_non_null(data);
    ssize_t count;
    /* The end of a process interrupts: a receive with a time limit is not restarted. */
    while ((count = recv(fd, data + size, capacity - size - 1, 0)) > 0 ||
           (count < 0 && errno == EINTR)) {
        size += count > 0 ? (size_t)count : 0;
        if (capacity - size < 2) {
            capacity *= 2;
            data = realloc(data, capacity);
            assert_non_null(data);
        }
    }
    data[size] = '\0';
    return data;
}

/* HTTP/1.0, so that the answer is never chunked and ends with the connection. */
int agent_request(const struct agent *agent, const char *method, const char *path,
                  const char *body, char **answer) {
    struct sockaddr_in address = loopback(agent->ports[PORT_HTTP]);
    struct timeval limit = {15, 0};
    char *request = NULL;
    char *response = NULL;
    int status = -1;
    int size = asprintf(
        &request,
        "%s %s HTTP/1.0\r\nHost: %s\r\n%s%s%sContent-Length: %zu\r\n\r\n"
        "%s",
        method, path, agent->address, agent->token != NULL ? "X-Consul-Token: " : "",
        agent->token != NULL ? agent->token : "", agent->token != NULL ? "\r\n" : "",
        body != NULL ? strlen(body) : 0, body != NULL ? body : "");
    assert_true(size > 0);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0 &&
        write_all(fd, request, (size_t)size)) {
        response = read_all(fd);
        char *content = strstr(response, "\r\n\r\n");
        if (content != NULL && strncmp(response, "HTTP/1.", 7) == 0) {
            status = (int)strtol(response + 9, NULL, 10);
            if (answer != NULL) {
                *answer = copy(content + 4);
            }
        }
    }
    close(fd);
    free(response);
    free(request);
    return status;
}
