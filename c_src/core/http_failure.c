/*
 * curl's results -> failures for people. L3, any thread.
 *
 * A code says whether the request can have arrived; curl's and OpenSSL's own words only
 * choose the remedy that is named, so that an unknown wording costs no more than that.
 */
#include "http_failure.h"
#include "error.h"
#include <string.h>

/* OpenSSL's x509_vfy.h, which nothing else here needs. */
enum { NOT_YET_VALID = 9, HAS_EXPIRED = 10 };

enum trouble { NO_MEMORY, TOO_LARGE, TLS, NOT_HTTP, BROKEN, UNREACHABLE };

static bool is_secure(const struct http_transfer *transfer) {
    return strncmp(transfer->endpoint->url, "https:", 6) == 0;
}

static bool says(const struct http_transfer *transfer, const char *words) {
    return strstr(transfer->words, words) != NULL;
}

static enum trouble trouble_of(const struct http_transfer *transfer) {
    switch (transfer->result) {
    case CURLE_OUT_OF_MEMORY:
        return NO_MEMORY;
    case CURLE_WRITE_ERROR: /* our own, or a body that can't be decoded */
        return transfer->out_of_memory ? NO_MEMORY
               : transfer->too_large   ? TOO_LARGE
                                       : NOT_HTTP;
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CERTPROBLEM:
    case CURLE_SSL_CLIENTCERT: /* the agent wants one, or another one */
    case CURLE_SSL_CIPHER:
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_SSL_ISSUER_ERROR:
    case CURLE_SSL_CRL_BADFILE:
    case CURLE_SSL_ENGINE_NOTFOUND:
    case CURLE_SSL_ENGINE_SETFAILED:
    case CURLE_SSL_ENGINE_INITFAILED:
    case CURLE_SSL_INVALIDCERTSTATUS:
    case CURLE_SSL_SHUTDOWN_FAILED:
        return TLS;
    case CURLE_BAD_FUNCTION_ARGUMENT: /* curl 8.23: a key that can't be used */
        return is_secure(transfer) ? TLS : UNREACHABLE;
    case CURLE_WEIRD_SERVER_REPLY:
    case CURLE_UNSUPPORTED_PROTOCOL: /* an answer without HTTP's first line */
    case CURLE_BAD_CONTENT_ENCODING:
        return NOT_HTTP;
    case CURLE_RECV_ERROR:
        if (is_secure(transfer) && says(transfer, "alert")) {
            return TLS; /* TLS 1.3: only after the handshake */
        }
        /* Chunks that can't be decoded come as this too, but the system had no part. */
        return !is_secure(transfer) && transfer->error_number == 0 ? NOT_HTTP : BROKEN;
    case CURLE_GOT_NOTHING:
    case CURLE_PARTIAL_FILE:
    case CURLE_SEND_ERROR:
        return BROKEN;
    default:
        return UNREACHABLE;
    }
}

/* Which setting a failed handshake speaks of. */
static const char *tls_remedy(const struct http_transfer *transfer) {
    switch (transfer->result) {
    case CURLE_SSL_CERTPROBLEM:
    case CURLE_BAD_FUNCTION_ARGUMENT:
        return "CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY must be a certificate and its "
               "key, "
               "both PEM and without password";
    case CURLE_SSL_CACERT_BADFILE:
        return "CONSUL_CACERT or CONSUL_CAPATH must hold PEM certificates";
    case CURLE_PEER_FAILED_VERIFICATION:
        if (transfer->verify_result == HAS_EXPIRED ||
            transfer->verify_result == NOT_YET_VALID) {
            return "the agent needs a certificate that is valid now (or this host the "
                   "right "
                   "time)";
        }
        if (says(transfer, "match")) {
            return "CONSUL_TLS_SERVER_NAME must be a name that the agent's certificate "
                   "is "
                   "for, unless the host of CONSUL_HTTP_ADDR is one";
        }
        return "CONSUL_CACERT or CONSUL_CAPATH must be the authority that signed the "
               "agent's certificate";
    default:
        break;
    }
    if (says(transfer, "alert") &&
        (says(transfer, "certificate") || says(transfer, "unknown ca"))) {
        return transfer->endpoint->client_cert == NULL
                   ? "the agent asks for a client certificate: set CONSUL_CLIENT_CERT "
                     "and "
                     "CONSUL_CLIENT_KEY"
                   : "the agent refuses CONSUL_CLIENT_CERT: it must be valid now and "
                     "signed "
                     "by an authority that the agent knows";
    }
    return "is CONSUL_HTTP_ADDR the agent's HTTPS port? Else check CONSUL_CACERT, "
           "CONSUL_CLIENT_CERT, CONSUL_TLS_SERVER_NAME";
}

void http_failure_set(const struct http_transfer *transfer,
                      struct meshx_failure *failure) {
    const char *agent = transfer->endpoint->shown;
    char words[128];
    const char *why = transfer->words[0] != '\0' ? transfer->words
                                                 : curl_easy_strerror(transfer->result);
    if (transfer->result == CURLE_COULDNT_CONNECT && transfer->error_number != 0) {
        /* curl's own text leaves it out. */
        why = strerror_r((int)transfer->error_number, words, sizeof words);
    }
    switch (trouble_of(transfer)) {
    case NO_MEMORY:
        error_set(failure, MESHX_ENOMEM, "out of memory");
        break;
    case TOO_LARGE:
        error_set(failure, MESHX_EAGENT_ANSWER,
                  "Consul agent at %s: its answer is larger than %zu MiB; is "
                  "CONSUL_HTTP_ADDR the agent's HTTP port?",
                  agent, transfer->limit >> 20);
        break;
    case TLS:
        error_set(failure, MESHX_EAGENT_TLS, "Consul agent at %s: TLS failed: %s; %s",
                  agent, why, tls_remedy(transfer));
        break;
    case NOT_HTTP:
        error_set(failure, MESHX_EAGENT_ANSWER,
                  "Consul agent at %s: its answer is not HTTP: %s; is CONSUL_HTTP_ADDR "
                  "the agent's HTTP port?",
                  agent, why);
        break;
    case BROKEN:
        error_set(failure, MESHX_EAGENT_ANSWER,
                  "Consul agent at %s broke the connection: %s; is it running, "
                  "CONSUL_HTTP_ADDR its HTTP port, and it below its limit "
                  "http_max_conns_per_client%s?",
                  agent, why,
                  is_secure(transfer) ? ", does it accept CONSUL_CLIENT_CERT" : "");
        break;
    case UNREACHABLE:
        error_set(failure, MESHX_EAGENT_UNREACHABLE,
                  "Consul agent at %s can't be reached: %s; is it running? "
                  "CONSUL_HTTP_ADDR says where it is",
                  agent, why);
        break;
    }
}
