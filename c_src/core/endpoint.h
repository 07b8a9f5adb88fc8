/*
 * Where the Consul agent is and how to speak to it: Consul's own environment variables
 * with their official meaning
 * (https://developer.hashicorp.com/consul/commands#environment-variables). L1.
 *
 * Immutable after endpoint_init(), but for the token file, which is read at every request
 * so that a rotated token is used at once.
 */
#ifndef MESHX_CORE_ENDPOINT_H
#define MESHX_CORE_ENDPOINT_H

#include "meshx_node.h"
#include "buf.h"

struct endpoint {
    char *url;         /* "http://127.0.0.1:8500" or "https://...", no slash at the end */
    char *unix_socket; /* path, or NULL */
    char *shown;       /* for people: address as given, or |url| if that has no port */
    char *token;       /* CONSUL_HTTP_TOKEN, or NULL */
    char *token_file;  /* wins over token, or NULL */
    char *auth;        /* "user:password", or NULL */
    bool verify;       /* check the agent's certificate */
    char *ca_file;
    char *ca_path;
    char *client_cert;
    char *client_key;
    char *server_name; /* CONSUL_TLS_SERVER_NAME: SNI and name to verify, or NULL */
    char *host;        /* host part of the URL, an IPv6 address in its brackets */
    uint16_t port;     /* port part of the URL */
    char *query;       /* "ns=x&partition=y" from CONSUL_NAMESPACE/_PARTITION, or NULL */
};

/*
 * Reads |settings| (ended by a NULL name, or NULL itself) into |endpoint|. An unset or
 * empty variable is its default, CONSUL_HTTP_ADDR's is 127.0.0.1:8500. Other names are
 * ignored.
 *
 * CONSUL_HTTP_ADDR may be host[:port][/prefix], the same after http:// or https://, or
 * unix:///path; CONSUL_HTTP_SSL=true makes any of them TLS. A port left out is 8500, but
 * after http:// 80 and after https:// 443. Files that are named must be readable.
 *
 * Returns MESHX_OK, MESHX_ENOMEM or MESHX_ECONFIG (|failure| names variable, value and
 * what is allowed; never a token or password). On failure nothing is left allocated.
 */
int endpoint_init(struct endpoint *endpoint, const struct meshx_setting *settings,
                  struct meshx_failure *failure);

/*
 * Appends the token to use now to |out| (nothing if there is none). Re-reads the token
 * file, without white space around it; while the file is empty CONSUL_HTTP_TOKEN counts,
 * as in Consul. MESHX_OK, MESHX_ENOMEM or MESHX_ECONFIG (file unreadable or no token).
 */
int endpoint_token(const struct endpoint *endpoint, struct buf *out,
                   struct meshx_failure *failure);

/* Appends all files of CONSUL_CAPATH to |out|. MESHX_OK or MESHX_ENOMEM. */
int endpoint_certificates(const struct endpoint *endpoint, struct buf *out);

/* Frees the fields, overwriting the secrets first. Accepts an all-zero endpoint. */
void endpoint_fini(struct endpoint *endpoint);

#endif
