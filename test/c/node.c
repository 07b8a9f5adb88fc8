#include "node.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { LIMIT_SECONDS = 60, RENEW_INTERVAL_MS = 100, PAUSES_MAX = 60000 };

static unsigned pauses;

void node_pauses_begin(void) {
    pauses = 0;
}

void node_pause(void) {
    const struct timespec time = {0, 5000000};
    assert_in_range(++pauses, 1, PAUSES_MAX);
    nanosleep(&time, NULL);
}

static time_t seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec;
}

/* ---- the listener: echoes until its pipe is closed ---- */

static void renew(struct node *node) {
    pthread_mutex_lock(&node->lock);
    if (node->renewed != NULL && !node->stuck) {
        meshx_mesh_renew(node->renewed);
    }
    pthread_mutex_unlock(&node->lock);
}

static void *echo_main(void *argument) {
    struct node *node = argument;
    struct pollfd fds[34] = {{.fd = node->wake[0], .events = POLLIN},
                             {.fd = node->listener, .events = POLLIN}};
    nfds_t count = 2;
    while (poll(fds, count, RENEW_INTERVAL_MS) >= 0 && fds[0].revents == 0) {
        renew(node);
        if (fds[1].revents != 0 && count < 34) {
            int fd = accept(node->listener, NULL, NULL);
            if (fd >= 0) {
                fds[count] = (struct pollfd){.fd = fd, .events = POLLIN};
                fds[count++].revents = 0;
            }
        }
        for (nfds_t i = 2; i < count; i++) {
            char bytes[512];
            ssize_t size =
                fds[i].revents != 0 ? recv(fds[i].fd, bytes, sizeof bytes, 0) : -2;
            if (size > 0) {
                (void)send(fds[i].fd, bytes, (size_t)size, MSG_NOSIGNAL);
            } else if (size != -2) {
                close(fds[i].fd);
                fds[i--] = fds[--count];
            }
        }
    }
    for (nfds_t i = 2; i < count; i++) {
        close(fds[i].fd);
    }
    return NULL;
}

static uint16_t listen_and_echo(struct node *node) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    node->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    assert_int_equal(bind(node->listener, (struct sockaddr *)&address, size), 0);
    assert_int_equal(listen(node->listener, 64), 0);
    assert_int_equal(getsockname(node->listener, (struct sockaddr *)&address, &size), 0);
    assert_int_equal(pipe2(node->wake, O_CLOEXEC), 0);
    assert_int_equal(pthread_create(&node->echo, NULL, echo_main, node), 0);
    return ntohs(address.sin_port);
}

/* ---- the record ---- */

static void on_event(const struct meshx_event *event, void *context) {
    struct node *node = context;
    const char *text = event->failure != NULL ? event->failure->text : event->text;
    pthread_mutex_lock(&node->lock);
    if (node->count < NODE_EVENTS) {
        struct node_event *record = &node->events[node->count++];
        record->waited_for = false; /* the place may have been another one's */
        record->type = event->type;
        record->request = event->request;
        record->code = event->failure != NULL ? event->failure->code : MESHX_OK;
        record->port = event->port;
        record->direct = event->direct;
        record->level = event->level;
        snprintf(record->text, sizeof record->text, "%s", text != NULL ? text : "");
        if (event->info != NULL) {
            record->info = *event->info;
            for (size_t i = 0; i < event->info->upstream_count && i < NODE_UPSTREAMS;
                 i++) {
                record->upstream_ports[i] = event->info->upstreams[i].port;
            }
            if (event->info->last_failure != NULL) {
                snprintf(record->text, sizeof record->text, "%s",
                         event->info->last_failure->text);
            }
        }
        pthread_cond_broadcast(&node->changed);
    }
    pthread_mutex_unlock(&node->lock);
    if (getenv("MESHX_TEST_VERBOSE") != NULL) { // NOLINT(concurrency-mt-unsafe)
        fprintf(stderr, "%s: event %d request %llu code %d: %s\n", node->name,
                (int)event->type, (unsigned long long)event->request,
                event->failure != NULL ? event->failure->code : 0,
                text != NULL ? text : "");
    }
}

static void on_release(void *context) {
    struct node *node = context;
    pthread_mutex_lock(&node->lock);
    node->released = true;
    pthread_cond_broadcast(&node->changed);
    pthread_mutex_unlock(&node->lock);
}

/* |types|: a bit for each */
static bool matches(const struct node_event *event, unsigned types, uint64_t request,
                    const char *text) {
    return (1U << event->type & types) != 0 &&
           (request == 0 || event->request == request) &&
           (text == NULL || strstr(event->text, text) != NULL);
}

void node_show_events(const struct node *node) {
    for (size_t i = 0; i < node->count; i++) {
        const struct node_event *event = &node->events[i];
        print_error("%s: event %d request %llu code %d: %s\n", node->name,
                    (int)event->type, (unsigned long long)event->request, event->code,
                    event->text);
    }
}

static const struct node_event *wait_for(struct node *node, unsigned types,
                                         uint64_t request, const char *text) {
    struct node_event *found = NULL;
    struct timespec limit;
    int error = 0;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += LIMIT_SECONDS;
    pthread_mutex_lock(&node->lock);
    while (found == NULL && error == 0) {
        for (size_t i = 0; i < node->count && found == NULL; i++) {
            struct node_event *event = &node->events[i];
            if (!event->waited_for && matches(event, types, request, text)) {
                found = event;
            }
        }
        if (found == NULL) {
            error = pthread_cond_timedwait(&node->changed, &node->lock, &limit);
        }
    }
    if (found != NULL) {
        found->waited_for = true;
    } else {
        node_show_events(node);
    }
    pthread_mutex_unlock(&node->lock);
    if (found == NULL) {
        fail_msg("%s: no event of 0x%x with \"%s\"", node->name, types,
                 text != NULL ? text : "");
    }
    return found;
}

const struct node_event *node_wait(struct node *node, enum meshx_event_type type,
                                   uint64_t request, const char *text) {
    return wait_for(node, 1U << type, request, text);
}

const struct node_event *node_wait_started(struct node *node) {
    return wait_for(node, 1U << MESHX_EVENT_READY | 1U << MESHX_EVENT_FAILED, 0, NULL);
}

size_t node_count(struct node *node, enum meshx_event_type type, const char *text) {
    size_t count = 0;
    pthread_mutex_lock(&node->lock);
    for (size_t i = 0; i < node->count; i++) {
        count += matches(&node->events[i], 1U << type, 0, text) ? 1 : 0;
    }
    pthread_mutex_unlock(&node->lock);
    return count;
}

/* ---- life ---- */

static const char *consul_binary(void) {
    const char *path = getenv("MESHX_CONSUL"); // NOLINT(concurrency-mt-unsafe)
    return path != NULL && path[0] != '\0' ? path : "_build/consul/usr/bin/consul";
}

struct node *node_new(const struct agent *agent, const char *name) {
    struct node *node = calloc(1, sizeof *node);
    assert_non_null(node);
    pthread_mutex_init(&node->lock, NULL);
    pthread_cond_init(&node->changed, NULL);
    snprintf(node->name, sizeof node->name, "%s", name);
    snprintf(node->environment_text, sizeof node->environment_text, "CONSUL_HTTP_ADDR=%s",
             agent_address(agent));
    node->environment[0] = node->environment_text;
    node->settings[0] = (struct meshx_setting){"CONSUL_HTTP_ADDR", agent_address(agent)};
    node->command[0] = consul_binary();
    node->command[1] = "connect";
    node->command[2] = "proxy";
    node->command[3] = "-sidecar-for";
    node->command[4] = node->name;
    node->config = (struct meshx_config){
        .node = node->name,
        .service_id = node->name,
        .service_name = node->name,
        .listen_address = "127.0.0.1",
        .listen_port = listen_and_echo(node),
        .consul = node->settings,
        .sidecar_command = node->command,
        .sidecar_environment = node->environment,
        .guard_path = getenv("MESHX_GUARD"), // NOLINT(concurrency-mt-unsafe)
        .sidecar_ports = {21000, 23999},
        .upstream_ports = {24000, 26999},
        .sidecar_restart_min = 100,
        .sidecar_restart_max = 5000,
        .ttl = 3000,
        .deregister_after = 60000,
        .start_timeout = 30000,
        .request_timeout = 10000,
        .stop_timeout = 5000,
        .upstream_keep = 600000};
    return node;
}

int node_try_open(struct node *node, struct meshx_loop *loop) {
    struct meshx_callbacks callbacks = {on_event, on_release, node};
    struct meshx_failure failure = {0};
    int code = meshx_mesh_open(loop, &node->config, &callbacks, &node->mesh, &failure);
    assert_true(code == MESHX_OK || failure.code == code);
    pthread_mutex_lock(&node->lock);
    node->renewed = node->mesh;
    pthread_mutex_unlock(&node->lock);
    return code;
}

void node_open(struct node *node, struct meshx_loop *loop) {
    assert_int_equal(node_try_open(node, loop), MESHX_OK);
}

struct node *node_start(struct meshx_loop *loop, const struct agent *agent,
                        const char *name) {
    struct node *node = node_new(agent, name);
    node_open(node, loop);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    return node;
}

void node_free(struct node *node) {
    if (node->mesh != NULL) {
        pthread_mutex_lock(&node->lock);
        node->renewed = NULL;
        pthread_mutex_unlock(&node->lock);
        meshx_mesh_close(node->mesh);
        pthread_mutex_lock(&node->lock);
        while (!node->released) {
            pthread_cond_wait(&node->changed, &node->lock);
        }
        pthread_mutex_unlock(&node->lock);
        assert_int_equal(node_count(node, MESHX_EVENT_STOPPED, NULL), 1);
        assert_int_equal(node->events[node->count - 1].type, MESHX_EVENT_STOPPED);
    }
    close(node->wake[1]);
    pthread_join(node->echo, NULL);
    close(node->wake[0]);
    close(node->listener);
    pthread_cond_destroy(&node->changed);
    pthread_mutex_destroy(&node->lock);
    free(node);
}

/* ---- questions ---- */

const struct node_event *node_info(struct node *node) {
    uint64_t request = ++node->requests;
    assert_int_equal(meshx_mesh_info(node->mesh, request), MESHX_OK);
    const struct node_event *answer = node_wait(node, MESHX_EVENT_INFO, request, NULL);
    pthread_mutex_lock(&node->lock);
    node->info = *answer;
    if (answer == &node->events[node->count - 1]) {
        node->count--; /* however often it is asked, there is room for other events */
    }
    pthread_mutex_unlock(&node->lock);
    return &node->info;
}

int node_info_refused(struct node *node) {
    return meshx_mesh_info(node->mesh, ++node->requests);
}

const struct node_event *node_upstream(struct node *node, const char *other,
                                       const char *service_name,
                                       enum meshx_upstream_mode mode) {
    uint64_t request = ++node->requests;
    assert_int_equal(
        meshx_mesh_upstream(node->mesh, request, other, other, service_name, mode),
        MESHX_OK);
    return node_wait(node, MESHX_EVENT_UPSTREAM, request, NULL);
}

const struct node_event *node_accept(struct node *node, const char *other,
                                     const char *service_name) {
    uint64_t request = ++node->requests;
    assert_int_equal(meshx_mesh_accept(node->mesh, request, other, service_name, 0),
                     MESHX_OK);
    return node_wait(node, MESHX_EVENT_UPSTREAM, request, NULL);
}

const struct node_event *node_stop(struct node *node) {
    meshx_mesh_stop(node->mesh);
    return node_wait(node, MESHX_EVENT_STOPPED, 0, NULL);
}

void node_wait_agent(const struct agent *agent, const char *path, int status,
                     const char *text) {
    time_t limit = seconds() + LIMIT_SECONDS;
    for (;;) {
        char *body = NULL;
        int answered = agent_request(agent, "GET", path, NULL, &body);
        bool right = answered == status &&
                     (text == NULL || (body != NULL && strstr(body, text) != NULL));
        if (!right && seconds() > limit) {
            fail_msg("%s answers %d %s, not %d %s", path, answered, body, status,
                     text != NULL ? text : "");
        }
        free(body);
        if (right) {
            return;
        }
        node_pause();
    }
}

bool node_echo(uint16_t port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct timeval patience = {20, 0};
    char bytes[8] = "";
    time_t limit = seconds() + LIMIT_SECONDS;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    while (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        if (errno != ECONNREFUSED || seconds() > limit) {
            fail_msg("port %u: %s", port, strerror(errno));
        }
        close(fd);
        node_pause();
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    }
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    bool echoed = send(fd, "through", 7, MSG_NOSIGNAL) == 7 &&
                  recv(fd, bytes, 7, MSG_WAITALL) == 7 &&
                  memcmp(bytes, "through", 7) == 0;
    close(fd);
    return echoed;
}
