/*
 * A little HTTP server in threads of the test that answers as badly as asked for. The
 * path says how:
 *
 *   /hello            200 "hello"               /echo       200, the request as it came
 *   /status/503       that status, body "503"   /chunked    200 "hello" in chunks
 *   /garbage          no HTTP                   /bad-chunk  chunks that are none
 *   /nothing          closes without a byte     /cut        closes amid the body
 *   /huge             17 MiB                    /endless    chunks without end
 *   /silent           never answers             /gate       "hello" once the gate is open
 *   /hello-and-close  "hello", then closes the idle connection
 *   /fresh            "hello" if it is the connection's first request, else closes it
 *   /v1/...           what web_server_set_answer() said
 *   /redirect, /redirect-loop, /redirect-away   301 to /hello, itself, another origin
 *
 * Nothing here allocates while requests run, so allocation_fail() can count on the core.
 */
#ifndef MESHX_TEST_WEB_SERVER_H
#define MESHX_TEST_WEB_SERVER_H

#include "support.h"

struct web_server;

/* Listens at a free port of 127.0.0.1, or at a Unix socket if |path| is not NULL. */
void web_server_start(const char *path, struct web_server **out);
/* Closes what is open, joins all threads, frees. */
void web_server_stop(struct web_server *server);

uint16_t web_server_port(const struct web_server *server);
/* Where /redirect-away leads: this port of 127.0.0.1. */
void web_server_lead_away(struct web_server *server, uint16_t port);
/* |body| is borrowed for the server's life. Status 0: never answers. */
void web_server_set_answer(struct web_server *server, int status, const char *body);
void web_server_open_gate(struct web_server *server);
/* Returns when |count| requests have come in all. */
void web_server_wait_requests(struct web_server *server, int count);

int web_server_requests(struct web_server *server);
int web_server_connections(struct web_server *server); /* accepted so far */

#endif
