/*
 * Plain TCP without Erlang: what loopback, or the Consul proxies when PORT is a sidecar's
 * upstream, give to a program that does nothing else. The benchmarks' yardstick.
 *
 * tcp server PORT: serves 127.0.0.1:PORT (0: a free one) until stdin ends; prints
 * "port N" when it is ready.
 *
 * tcp roundtrip PORT SIZE MILLISECONDS: one message outstanding; prints the round trip's
 * p50, p99 and p99.9 in us, and how many there were.
 *
 * tcp clients PORT SIZE N MILLISECONDS: N messages outstanding; prints round trips/s.
 *
 * tcp stream PORT SIZE MILLISECONDS: one way, SIZE bytes a write; prints MB/s and bytes.
 *
 * The server has a thread for each connection; a client has one connection and one
 * thread. A connection begins with an order, which the server answers, so that the way
 * through the proxies is open before the clock starts. No meaning is in closing half of a
 * connection, which a proxy may take for closing all of it: a stream ends with a byte of
 * its own. An error is one line on stderr and exit status 1; the server outlives its
 * connections' errors.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Large, so that few system calls are needed. */
#define READ_SIZE ((size_t)480 * 1024)
#define MAX_SIZE ((size_t)64 * 1024 * 1024)
#define MAX_CLIENTS 4096
#define MAX_MILLISECONDS ((size_t)60 * 60 * 1000)
/* A client gives up then. A write that got a part away waits once more. */
#define NO_PROGRESS_SECONDS 30

/* Every byte of every message, and the one that follows a stream's last message. */
#define CONTENT 'm'
#define END 'e'

/* A connection's first bytes. Both sides are this program on one machine. */
enum mode { ECHO_MESSAGES = 0x7e51, TAKE_STREAM };
struct order {
    enum mode mode;
    uint32_t size;
};

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format,
                                                                 ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("tcp: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static struct sockaddr_in loopback(uint16_t port) {
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons(port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static void set_nodelay(int fd) {
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
}

/* False at an error, with errno; an EAGAIN is the socket's time limit. */
static bool send_all(int fd, const void *data, size_t size) {
    const char *next = data;
    while (size > 0) {
        ssize_t sent = send(fd, next, size, MSG_NOSIGNAL);
        if (sent < 0) {
            return false;
        }
        next += sent;
        size -= (size_t)sent;
    }
    return true;
}

/* False at an error, with errno, and at the end, with errno 0. */
static bool receive_all(int fd, void *data, size_t size) {
    char *next = data;
    while (size > 0) {
        ssize_t received = recv(fd, next, size, 0);
        if (received <= 0) {
            errno = received == 0 ? 0 : errno;
            return false;
        }
        next += received;
        size -= (size_t)received;
    }
    return true;
}

/* ---- The server. A thread returns when its connection ends, for whatever reason. */

/* Sends every message back when it is there as a whole, those that have come together in
 * one write. */
static void serve_echo(int fd, char *buffer, size_t capacity, size_t size) {
    size_t filled = 0;
    for (;;) {
        ssize_t received = recv(fd, buffer + filled, capacity - filled, 0);
        if (received <= 0) {
            return;
        }
        filled += (size_t)received;
        size_t rest = filled % size;
        if (!send_all(fd, buffer, filled - rest)) {
            return;
        }
        memmove(buffer, buffer + filled - rest, rest);
        filled = rest;
    }
}

/* Nothing follows END: it can only be the last byte of what a recv() brings. */
static void serve_stream(int fd, char *buffer, size_t capacity) {
    uint64_t total = 0;
    ssize_t received;
    do {
        received = recv(fd, buffer, capacity, 0);
        if (received <= 0) {
            return;
        }
        total += (uint64_t)received;
    } while (buffer[received - 1] != END);
    if (send_all(fd, &total, sizeof total)) {
        recv(fd, buffer, 1,
             0); /* until the client closes, lest a proxy drops the answer */
    }
}

static void *serve(void *argument) {
    int fd = (int)(intptr_t)argument;
    struct order order;
    if (receive_all(fd, &order, sizeof order) && order.size > 0 &&
        order.size <= MAX_SIZE) {
        size_t capacity = order.size > READ_SIZE ? order.size : READ_SIZE;
        char *buffer = malloc(capacity);
        if (buffer != NULL && send_all(fd, &order, sizeof order)) {
            if (order.mode == ECHO_MESSAGES) {
                serve_echo(fd, buffer, capacity, order.size);
            } else if (order.mode == TAKE_STREAM) {
                serve_stream(fd, buffer, capacity);
            }
        }
        free(buffer);
    }
    close(fd);
    return NULL;
}

static void accept_one(int listener) {
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) {
        if (errno != ECONNABORTED) {
            fail("accept: %s", strerror(errno));
        }
        return;
    }
    set_nodelay(fd);
    pthread_t thread;
    int error = pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd);
    if (error != 0) {
        fail("a thread: %s", strerror(error));
    }
    pthread_detach(thread);
}

static void server(uint16_t port) {
    struct sockaddr_in address = loopback(port);
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(listener, (struct sockaddr *)&address, length) != 0 ||
        listen(listener, SOMAXCONN) != 0 ||
        getsockname(listener, (struct sockaddr *)&address, &length) != 0) {
        fail("port %u: %s", port, strerror(errno));
    }
    printf("port %u\n", ntohs(address.sin_port));
    fflush(stdout);

    struct pollfd events[] = {{.fd = STDIN_FILENO, .events = POLLIN},
                              {.fd = listener, .events = POLLIN}};
    char ignored[256];
    do {
        if (poll(events, 2, -1) < 0) {
            fail("poll: %s", strerror(errno));
        }
        if (events[1].revents != 0) {
            accept_one(listener);
        }
    } while (events[0].revents == 0 || read(STDIN_FILENO, ignored, sizeof ignored) > 0);
}

/* ---- The clients. */

__attribute__((noreturn)) static void fail_connection(void) {
    if (errno == EAGAIN || errno == EINPROGRESS) {
        fail("no progress for %d s", NO_PROGRESS_SECONDS);
    }
    fail("the connection: %s", errno == 0 ? "closed by the other side" : strerror(errno));
}

static int connect_as(enum mode mode, uint16_t port, size_t size) {
    struct sockaddr_in address = loopback(port);
    struct timeval limit = {.tv_sec = NO_PROGRESS_SECONDS};
    struct order order = {.mode = mode, .size = (uint32_t)size}, answer;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    set_nodelay(fd);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
        !send_all(fd, &order, sizeof order) || !receive_all(fd, &answer, sizeof answer)) {
        fail_connection();
    }
    return fd;
}

static void *allocate(void *old, size_t size) {
    void *new = realloc(old, size);
    if (new == NULL) {
        fail("no memory");
    }
    return new;
}

static char *content(size_t size) {
    return memset(allocate(NULL, size), CONTENT, size);
}

static int compare(const void *left, const void *right) {
    uint64_t one = *(const uint64_t *)left, other = *(const uint64_t *)right;
    return (one > other) - (one < other);
}

/* By nearest rank, in us; |times| are sorted. */
static double quantile(const uint64_t *times, size_t count, size_t per_mille) {
    size_t place = (count * per_mille + 999) / 1000 - 1;
    return (double)times[place] / 1e3;
}

static void roundtrip(uint16_t port, size_t size, uint64_t duration) {
    int fd = connect_as(ECHO_MESSAGES, port, size);
    char *message = content(size);
    uint64_t *times = NULL;
    size_t count = 0, capacity = 0;
    uint64_t begin = now(), sent, back;
    do {
        sent = now();
        if (!send_all(fd, message, size) || !receive_all(fd, message, size)) {
            fail_connection();
        }
        back = now();
        if (count == capacity) {
            capacity = capacity == 0 ? (size_t)1 << 16 : 2 * capacity;
            times = allocate(times, capacity * sizeof *times);
        }
        times[count++] = back - sent;
    } while (back - begin < duration);
    qsort(times, count, sizeof *times, compare);
    printf("%.1f %.1f %.1f %zu\n", quantile(times, count, 500),
           quantile(times, count, 990), quantile(times, count, 999), count);
    free(times);
    free(message);
    close(fd);
}

/* Never waits for room alone: the server reads on only after it has sent its echo. */
static void clients(uint16_t port, size_t size, size_t messages, uint64_t duration) {
    int fd = connect_as(ECHO_MESSAGES, port, size);
    size_t outstanding = messages * size, unsent = outstanding, received = 0, done = 0;
    char *buffer = content(outstanding); /* what comes back is what it already holds */
    uint64_t begin = now(), time = begin;
    for (; time - begin < duration; time = now()) {
        if (unsent > 0) {
            ssize_t sent = send(fd, buffer, unsent, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (sent < 0 && errno != EAGAIN) {
                fail_connection();
            }
            unsent -= sent < 0 ? 0 : (size_t)sent;
        }
        if (unsent > 0) {
            struct pollfd event = {.fd = fd, .events = POLLIN | POLLOUT};
            if (poll(&event, 1, NO_PROGRESS_SECONDS * 1000) == 0) {
                fail("no progress for %d s", NO_PROGRESS_SECONDS);
            }
            if ((event.revents & POLLIN) == 0) {
                continue;
            }
        }
        errno = 0;
        ssize_t more = recv(fd, buffer, outstanding, 0);
        if (more <= 0) {
            fail_connection();
        }
        received += (size_t)more;
        unsent += received - received % size;
        done += received / size;
        received %= size;
    }
    printf("%.0f\n", (double)done * 1e9 / (double)(time - begin));
    free(buffer);
    close(fd);
}

static void stream(uint16_t port, size_t size, uint64_t duration) {
    int fd = connect_as(TAKE_STREAM, port, size);
    char *message = content(size);
    uint64_t bytes = 0, arrived, begin = now();
    do {
        if (!send_all(fd, message, size)) {
            fail_connection();
        }
        bytes += size;
    } while (now() - begin < duration);
    if (!send_all(fd, &(char){END}, 1) || !receive_all(fd, &arrived, sizeof arrived)) {
        fail_connection();
    }
    uint64_t end = now();
    if (arrived != bytes + 1) {
        fail("%ju of %ju bytes have arrived", (uintmax_t)arrived, (uintmax_t)bytes + 1);
    }
    printf("%.1f %ju\n", (double)bytes * 1e3 / (double)(end - begin), (uintmax_t)bytes);
    free(message);
    close(fd);
}

/* ---- The command line. */

static size_t number(const char *text, size_t lowest, size_t highest) {
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || value < lowest || value > highest) {
        fail("'%s' is no number from %zu to %zu", text, lowest, highest);
    }
    return value;
}

static uint16_t port_of(const char *text, size_t lowest) {
    return (uint16_t)number(text, lowest, UINT16_MAX);
}

/* In nanoseconds. */
static uint64_t duration_of(const char *text) {
    return (uint64_t)number(text, 1, MAX_MILLISECONDS) * 1000000;
}

int main(int count, char **words) {
    const char *command = count > 1 ? words[1] : "";
    if (count == 3 && strcmp(command, "server") == 0) {
        server(port_of(words[2], 0));
    } else if (count == 5 && strcmp(command, "roundtrip") == 0) {
        roundtrip(port_of(words[2], 1), number(words[3], 1, MAX_SIZE),
                  duration_of(words[4]));
    } else if (count == 6 && strcmp(command, "clients") == 0) {
        clients(port_of(words[2], 1), number(words[3], 1, MAX_SIZE),
                number(words[4], 1, MAX_CLIENTS), duration_of(words[5]));
    } else if (count == 5 && strcmp(command, "stream") == 0) {
        stream(port_of(words[2], 1), number(words[3], 1, MAX_SIZE),
               duration_of(words[4]));
    } else {
        fail("server PORT | roundtrip PORT SIZE MILLISECONDS | "
             "clients PORT SIZE N MILLISECONDS | stream PORT SIZE MILLISECONDS");
    }
    return 0;
}
