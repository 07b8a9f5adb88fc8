/*
 * One thread accepts, one thread serves each connection; |lock| guards all that they
 * share. Stopping shuts every socket down, which ends their blocking calls.
 */
#include "web_server.h"
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 256, MAX_REQUEST = 65536 };

struct connection {
    struct web_server *server;
    pthread_t thread;
    int socket;
    bool open;  /* guarded by the server's lock */
    int status; /* of the answer to this request, chosen when it was counted */
    const char *body;
    char request[MAX_REQUEST];
};

struct web_server {
    int listener;
    uint16_t port;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct connection *connections; /* the rest is guarded by lock */
    int count;
    int requests;
    bool gate_open;
    bool stopping;
    uint16_t away_port;
    int status;
    const char *body;
};

static bool send_all(int fd, const char *data, size_t size) {
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

static bool send_text(int fd, const char *text) {
    return send_all(fd, text, strlen(text));
}

static bool send_answer(int fd, int status, const char *header, const char *body) {
    char head[640];
    snprintf(head, sizeof head, "HTTP/1.1 %d Some words\r\nContent-Length: %zu\r\n%s\r\n",
             status, strlen(body), header);
    return send_text(fd, head) && send_text(fd, body);
}

static bool send_hello(int fd) {
    return send_answer(fd, 200, "", "hello");
}

static bool send_much(int fd, bool endless) {
    static const char part[65536] = {'x'};
    bool ok =
        send_text(fd, endless ? "HTTP/1.1 200 OK\r\nTransfer-Encoding: "
                                "chunked\r\n\r\n"
                              : "HTTP/1.1 200 OK\r\nContent-Length: 17825792\r\n\r\n");
    for (int i = 0; ok && (endless || i < 272); i++) {
        ok = !endless || send_text(fd, "10000\r\n");
        ok = ok && send_all(fd, part, sizeof part);
        ok = ok && (!endless || send_text(fd, "\r\n"));
    }
    return ok;
}

/* Reads one request with its body. False: the client is gone. */
static bool read_request(struct connection *connection) {
    size_t size = 0;
    for (;;) {
        connection->request[size] = '\0';
        char *end = strstr(connection->request, "\r\n\r\n");
        if (end != NULL) {
            const char *length = strcasestr(connection->request, "Content-Length:");
            size_t body = length != NULL ? strtoul(length + 15, NULL, 10) : 0;
            if (size >= (size_t)(end + 4 - connection->request) + body) {
                return true;
            }
        }
        ssize_t count = recv(connection->socket, connection->request + size,
                             MAX_REQUEST - size - 1, 0);
        if (count <= 0) {
            return false;
        }
        size += (size_t)count;
    }
}

static void wait_gate(struct web_server *server) {
    pthread_mutex_lock(&server->lock);
    while (!server->gate_open && !server->stopping) {
        pthread_cond_wait(&server->changed, &server->lock);
    }
    pthread_mutex_unlock(&server->lock);
}

static void wait_client_gone(int fd) {
    char byte;
    while (recv(fd, &byte, 1, 0) > 0) {
    }
}

static bool redirect(int fd, const char *host, uint16_t port, const char *path) {
    char header[320];
    if (host != NULL) {
        snprintf(header, sizeof header, "Location: http://%s:%u%s\r\n", host, port, path);
    } else {
        snprintf(header, sizeof header, "Location: %s\r\n", path);
    }
    return send_answer(fd, 301, header, "moved");
}

/* Whether the connection stays open. |nth| request of the connection, from 0. */
static bool answer(struct connection *connection, int nth) {
    int fd = connection->socket;
    char path[256] = "";
    sscanf(connection->request, "%*s %255[^ ?]", path); // NOLINT(cert-err34-c)
    if (strcmp(path, "/echo") == 0) {
        return send_answer(fd, 200, "", connection->request);
    } else if (strncmp(path, "/status/", 8) == 0) {
        return send_answer(fd, (int)strtol(path + 8, NULL, 10), "", path + 8);
    } else if (strcmp(path, "/chunked") == 0) {
        return send_text(fd, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n") &&
               send_text(fd, "2\r\nhe\r\n") && send_text(fd, "3\r\nllo\r\n0\r\n\r\n");
    } else if (strcmp(path, "/bad-chunk") == 0) {
        send_text(fd, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n");
        wait_client_gone(fd);
        return false;
    } else if (strcmp(path, "/garbage") == 0) {
        send_text(fd, "220 mail.example.org ESMTP\r\n\r\n");
        return false;
    } else if (strcmp(path, "/nothing") == 0) {
        return false;
    } else if (strcmp(path, "/cut") == 0) {
        send_text(fd, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello");
        return false;
    } else if (strcmp(path, "/huge") == 0 || strcmp(path, "/endless") == 0) {
        return send_much(fd, strcmp(path, "/endless") == 0);
    } else if (strcmp(path, "/silent") == 0) {
        wait_client_gone(fd);
        return false;
    } else if (strcmp(path, "/gate") == 0) {
        wait_gate(connection->server);
        return send_hello(fd);
    } else if (strcmp(path, "/hello-and-close") == 0) {
        send_hello(fd);
        return false;
    } else if (strcmp(path, "/fresh") == 0) {
        return nth == 0 && send_hello(fd);
    } else if (strncmp(path, "/v1/", 4) == 0) {
        if (connection->status == 0) {
            wait_client_gone(fd);
            return false;
        }
        return send_answer(fd, connection->status, "", connection->body);
    } else if (strcmp(path, "/redirect") == 0) {
        return redirect(fd, NULL, 0, "/hello");
    } else if (strcmp(path, "/redirect-loop") == 0) {
        return redirect(fd, "127.0.0.1", connection->server->port, path);
    } else if (strcmp(path, "/redirect-away") == 0) {
        pthread_mutex_lock(&connection->server->lock);
        uint16_t away_port = connection->server->away_port;
        pthread_mutex_unlock(&connection->server->lock);
        return redirect(fd, "127.0.0.1", away_port, "/hello");
    }
    return send_hello(fd);
}

static void *serve(void *argument) {
    struct connection *connection = argument;
    struct web_server *server = connection->server;
    bool stays_open = true;
    for (int nth = 0; stays_open && read_request(connection); nth++) {
        pthread_mutex_lock(&server->lock);
        server->requests++;
        connection->status = server->status;
        connection->body = server->body;
        pthread_cond_broadcast(&server->changed);
        pthread_mutex_unlock(&server->lock);
        stays_open = answer(connection, nth);
    }
    pthread_mutex_lock(&server->lock);
    connection->open = false;
    close(connection->socket);
    pthread_mutex_unlock(&server->lock);
    return NULL;
}

static void *accept_all(void *argument) {
    struct web_server *server = argument;
    int fd;
    while ((fd = accept4(server->listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
        pthread_mutex_lock(&server->lock);
        if (server->stopping || server->count == MAX_CONNECTIONS) {
            close(fd);
        } else {
            struct connection *connection = &server->connections[server->count++];
            connection->server = server;
            connection->socket = fd;
            connection->open = true;
            pthread_create(&connection->thread, NULL, serve, connection);
        }
        pthread_mutex_unlock(&server->lock);
    }
    return NULL;
}

void web_server_start(const char *path, struct web_server **out) {
    struct sockaddr_in tcp = {.sin_family = AF_INET};
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    struct sockaddr *address = (struct sockaddr *)&tcp;
    socklen_t size = sizeof tcp;
    struct web_server *server = calloc(1, sizeof *server);
    assert_non_null(server);
    server->connections = calloc(MAX_CONNECTIONS, sizeof *server->connections);
    assert_non_null(server->connections);
    pthread_mutex_init(&server->lock, NULL);
    pthread_cond_init(&server->changed, NULL);
    tcp.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (path != NULL) {
        assert_true(strlen(path) < sizeof local.sun_path);
        strcpy(local.sun_path,
               path); // NOLINT(clang-analyzer-security.insecureAPI.strcpy)
        address = (struct sockaddr *)&local;
        size = sizeof local;
    }
    server->listener = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(server->listener, address, size), 0);
    assert_int_equal(listen(server->listener, 64), 0);
    assert_int_equal(getsockname(server->listener, address, &size), 0);
    server->status = 200;
    server->body = "";
    server->port = path == NULL ? ntohs(tcp.sin_port) : 0;
    assert_int_equal(pthread_create(&server->thread, NULL, accept_all, server), 0);
    *out = server;
}

void web_server_stop(struct web_server *server) {
    pthread_mutex_lock(&server->lock);
    server->stopping = true;
    pthread_cond_broadcast(&server->changed);
    for (int i = 0; i < server->count; i++) {
        if (server->connections[i].open) {
            shutdown(server->connections[i].socket, SHUT_RDWR);
        }
    }
    pthread_mutex_unlock(&server->lock);
    shutdown(server->listener, SHUT_RDWR);
    pthread_join(server->thread, NULL);
    for (int i = 0; i < server->count; i++) {
        pthread_join(server->connections[i].thread, NULL);
    }
    close(server->listener);
    pthread_cond_destroy(&server->changed);
    pthread_mutex_destroy(&server->lock);
    free(server->connections);
    free(server);
}

uint16_t web_server_port(const struct web_server *server) {
    return server->port;
}

void web_server_lead_away(struct web_server *server, uint16_t port) {
    pthread_mutex_lock(&server->lock);
    server->away_port = port;
    pthread_mutex_unlock(&server->lock);
}

void web_server_set_answer(struct web_server *server, int status, const char *body) {
    pthread_mutex_lock(&server->lock);
    server->status = status;
    server->body = body;
    pthread_mutex_unlock(&server->lock);
}

void web_server_open_gate(struct web_server *server) {
    pthread_mutex_lock(&server->lock);
    server->gate_open = true;
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->lock);
}

void web_server_wait_requests(struct web_server *server, int count) {
    pthread_mutex_lock(&server->lock);
    while (server->requests < count) {
        pthread_cond_wait(&server->changed, &server->lock);
    }
    pthread_mutex_unlock(&server->lock);
}

static int read_count(struct web_server *server, const int *count) {
    pthread_mutex_lock(&server->lock);
    int value = *count;
    pthread_mutex_unlock(&server->lock);
    return value;
}

int web_server_requests(struct web_server *server) {
    return read_count(server, &server->requests);
}

int web_server_connections(struct web_server *server) {
    return read_count(server, &server->count);
}
