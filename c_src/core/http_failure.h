/*
 * What a transfer of curl's that failed means: the culprit, and what a person can do. L3,
 * part of http.
 */
#ifndef MESHX_CORE_HTTP_FAILURE_H
#define MESHX_CORE_HTTP_FAILURE_H

#include "endpoint.h"
#include <curl/curl.h>

struct http_transfer {
    const struct endpoint *endpoint;
    CURLcode result;
    const char *words;  /* curl's error buffer, may be empty */
    long error_number;  /* errno of a failed connect, or 0 */
    long verify_result; /* OpenSSL's X509_V_..., if it could not verify the agent */
    bool too_large;     /* the body, larger than |limit| */
    size_t limit;
    bool out_of_memory;
};

/*
 * Sets |failure|. MESHX_EAGENT_UNREACHABLE and _TLS say that the agent has not got the
 * request; after MESHX_EAGENT_ANSWER it may have done what was asked.
 */
void http_failure_set(const struct http_transfer *transfer,
                      struct meshx_failure *failure);

#endif
