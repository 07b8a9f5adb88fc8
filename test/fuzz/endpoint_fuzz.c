/*
 * Consul's environment variables: what is accepted is a URL that curl understands the
 * same way and that is stable, and headers without a line of their own; no failure quotes
 * a secret. Input: lines NAME=value, of which the files' values stand for their content.
 */
#include "fuzz.h"

#include "endpoint.h"

#include <curl/curl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <unistd.h>

/* Begins every token and password here. */
#define SECRET "Zq7secret"
#define SETTINGS_MAX 16

struct settings {
    struct meshx_setting list[SETTINGS_MAX + 1];
    int file; /* what the variables that name a file lead to, or -1 */
    char path[32];
};

static bool ends_with(const char *text, const char *end) {
    size_t size = strlen(text);
    return size >= strlen(end) && strcmp(text + size - strlen(end), end) == 0;
}

static bool is_secret(const char *name) {
    return strcmp(name, "CONSUL_HTTP_TOKEN") == 0 ||
           strcmp(name, "CONSUL_HTTP_AUTH") == 0;
}

/* No file but our own is opened, whatever the input. */
static const char *path_for(struct settings *settings, const char *name,
                            const char *content) {
    if (ends_with(name, "CAPATH")) {
        return content[0] == '/' ? "/proc/self" : "/nowhere";
    }
    if (settings->file < 0) {
        settings->file = memfd_create("fuzz", MFD_CLOEXEC);
        CHECK(settings->file >= 0);
        CHECK(write(settings->file, content, strlen(content)) >= 0);
        snprintf(settings->path, sizeof settings->path, "/proc/self/fd/%d",
                 settings->file);
    }
    return content[0] == '!' ? "/nowhere" : settings->path;
}

static void add(struct settings *settings, size_t index, struct fuzz_input line) {
    static const char *const files[] = {"_FILE", "CACERT", "CAPATH", "CERT", "KEY"};
    char *name = fuzz_text(fuzz_until(&line, '='));
    char *content = fuzz_text(line);
    char *value = NULL;
    for (size_t i = 0; i < sizeof files / sizeof files[0] && value == NULL; i++) {
        if (ends_with(name, files[i]) && content[0] != '\0') {
            value = strdup(path_for(settings, name, content));
        }
    }
    if (value == NULL && is_secret(name) && content[0] != '\0') {
        CHECK(asprintf(&value, SECRET "%s", content) > 0);
    }
    if (value == NULL) {
        value = strdup(content);
    }
    CHECK(value != NULL);
    free(content);
    settings->list[index] = (struct meshx_setting){name, value};
}

static bool is_header(const char *text) {
    for (; *text != '\0'; text++) {
        if ((unsigned char)*text < 0x20 || *text == 0x7F) {
            return false;
        }
    }
    return true;
}

static bool curl_says(CURLU *url, CURLUPart part, const char *expected) {
    char *text = NULL;
    if (curl_url_get(url, part, &text, CURLU_DEFAULT_PORT) != CURLUE_OK) {
        return false;
    }
    bool result = strcasecmp(text, expected) == 0;
    curl_free(text);
    return result;
}

static void check_url(const struct endpoint *endpoint) {
    char port[8];
    snprintf(port, sizeof port, "%u", endpoint->port);
    CURLU *url = curl_url();
    CHECK(curl_url_set(url, CURLUPART_URL, endpoint->url, CURLU_PATH_AS_IS) == CURLUE_OK);
    CHECK(curl_says(url, CURLUPART_SCHEME,
                    strncmp(endpoint->url, "https:", 6) == 0 ? "https" : "http"));
    CHECK(curl_says(url, CURLUPART_PORT, port));
    /* It writes numeric addresses its own way. */
    CHECK(strspn(endpoint->host, "[0123456789") > 0 ||
          curl_says(url, CURLUPART_HOST, endpoint->host));
    CHECK(!curl_says(url, CURLUPART_QUERY, "") && !curl_says(url, CURLUPART_USER, ""));
    curl_url_cleanup(url);
}

/* The URL as an address is the same endpoint. */
static void check_stable(const struct endpoint *endpoint) {
    const struct meshx_setting settings[] = {{"CONSUL_HTTP_ADDR", endpoint->url}, {0}};
    struct endpoint again;
    CHECK(endpoint_init(&again, settings, NULL) == MESHX_OK);
    CHECK(strcmp(again.url, endpoint->url) == 0);
    CHECK(strcmp(again.host, endpoint->host) == 0);
    CHECK(again.port == endpoint->port);
    endpoint_fini(&again);
}

static void check_token(const struct endpoint *endpoint) {
    struct buf token = {0};
    int code = endpoint_token(endpoint, &token, NULL);
    CHECK(code == MESHX_OK);
    CHECK(strlen(buf_text(&token)) == token.size && is_header(buf_text(&token)));
    CHECK(endpoint->token_file == NULL || endpoint->token != NULL ||
          (token.size <= 4096 && strcspn(buf_text(&token), " \t") > 0) ||
          token.size == 0);
    CHECK(endpoint->token_file != NULL || endpoint->token == NULL ||
          strcmp(buf_text(&token), endpoint->token) == 0);
    buf_fini(&token);
}

static void check_endpoint(const struct endpoint *endpoint) {
    CHECK(endpoint->port > 0 && endpoint->host[0] != '\0' && endpoint->shown[0] != '\0');
    CHECK(strlen(endpoint->url) == strcspn(endpoint->url, " ?#@"));
    CHECK(is_header(endpoint->url));
    CHECK(strstr(endpoint->shown, SECRET) == NULL);
    check_url(endpoint);
    if (endpoint->unix_socket == NULL) {
        CHECK(strchr(endpoint->shown, '@') == NULL);
        check_stable(endpoint);
    }
    check_token(endpoint);
    CHECK(endpoint->auth == NULL || strchr(endpoint->auth, ':') != NULL);
    CHECK((endpoint->client_cert == NULL) == (endpoint->client_key == NULL));
    CHECK(endpoint->query == NULL ||
          strspn(endpoint->query, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                                  "0123456789-._~%=&") == strlen(endpoint->query));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fuzz_input input = {data, size};
    struct settings settings = {.file = -1};
    struct endpoint endpoint;
    struct meshx_failure failure = {0};
    bool quotes = size > 0 && memmem(data, size, "Zq7", 3) != NULL;
    for (size_t i = 0; i < SETTINGS_MAX && input.size > 0; i++) {
        add(&settings, i, fuzz_until(&input, '\n'));
    }
    int code = endpoint_init(&endpoint, settings.list, &failure);
    if (code != MESHX_OK) {
        CHECK(code == MESHX_ECONFIG);
        fuzz_check_failure(code, &failure);
        CHECK(quotes || strstr(failure.text, SECRET) == NULL);
    } else if (!quotes) {
        check_endpoint(&endpoint);
        endpoint_fini(&endpoint);
    } else {
        endpoint_fini(&endpoint);
    }
    for (size_t i = 0; settings.list[i].name != NULL; i++) {
        free((void *)settings.list[i].name);
        free((void *)settings.list[i].value);
    }
    if (settings.file >= 0) {
        close(settings.file);
    }
    return 0;
}
