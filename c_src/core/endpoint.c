/*
 * Consul's environment variables -> where the agent is and how to speak to it. L1, any
 * thread: an endpoint does not change after endpoint_init().
 *
 * Invariants: what becomes part of a URL or of a header was checked character by
 * character here, so http.c can paste it together; a token, a password and an address
 * that might hold one never get into a failure's text.
 *
 * Reference: NewClient() and defaultConfig() of hashicorp/consul api/api.go. Stricter
 * than that where Consul only logs or ignores: an invalid boolean, a certificate without
 * key.
 */
#include "endpoint.h"
#include "error.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define DEFAULT_ADDRESS "127.0.0.1:8500"
#define MAX_TOKEN ((size_t)4096)

/* Part of a string. */
struct slice {
    const char *start;
    size_t size;
};

static int out_of_memory(struct meshx_failure *failure) {
    return error_set(failure, MESHX_ENOMEM, "out of memory");
}

/* The value of variable |name|, NULL if it is unset or empty. Of duplicates the last. */
static const char *value_of(const struct meshx_setting *settings, const char *name) {
    const char *value = NULL;
    for (; settings != NULL && settings->name != NULL; settings++) {
        if (strcmp(settings->name, name) == 0) {
            value = settings->value;
        }
    }
    return value == NULL || value[0] == '\0' ? NULL : value;
}

/* Words of Go's strconv.ParseBool, which Consul uses. */
static int parse_boolean(const struct meshx_setting *settings, const char *name,
                         bool *out, struct meshx_failure *failure) {
    static const char *const words[2][6] = {
        {"0", "f", "F", "FALSE", "false", "False"},
        {"1", "t", "T", "TRUE", "true", "True"},
    };
    const char *value = value_of(settings, name);
    if (value == NULL) {
        return MESHX_OK;
    }
    for (size_t i = 0; i < 12; i++) {
        if (strcmp(value, words[i / 6][i % 6]) == 0) {
            *out = i >= 6;
            return MESHX_OK;
        }
    }
    return error_set(failure, MESHX_ECONFIG, "%s=%s: must be true or false", name, value);
}

/* May stand in a header: no control characters. */
static bool is_printable(const char *text, size_t size) {
    for (size_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x20 || c == 0x7F) {
            return false;
        }
    }
    return true;
}

/* A name or IPv4 address. */
static bool is_host_name(const char *text, size_t size) {
    for (size_t i = 0; i < size; i++) {
        char c = text[i];
        if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
              (c >= '0' && c <= '9') || c == '.' || c == '-' || c == '_')) {
            return false;
        }
    }
    return size > 0;
}

static bool is_ipv6(const char *text, size_t size) {
    char copy[INET6_ADDRSTRLEN];
    struct in6_addr address;
    if (size >= sizeof copy) {
        return false;
    }
    memcpy(copy, text, size);
    copy[size] = '\0';
    return inet_pton(AF_INET6, copy, &address) == 1;
}

static bool parse_port(const char *text, size_t size, uint16_t *out) {
    unsigned port = 0;
    if (size == 0 || size > 5) {
        return false;
    }
    for (size_t i = 0; i < size; i++) {
        if (text[i] < '0' || text[i] > '9') {
            return false;
        }
        port = port * 10 + (unsigned)(text[i] - '0');
    }
    *out = (uint16_t)port;
    return port >= 1 && port <= 65535;
}

static int address_failure(struct meshx_failure *failure, const char *value,
                           const char *problem) {
    return error_set(failure, MESHX_ECONFIG,
                     "CONSUL_HTTP_ADDR=%s: %s; allowed are host:port, http://host:port, "
                     "https://host:port and unix:///path",
                     value, problem);
}

/* Splits "host:port" of the address |value|; |*port| stays as it is when none is given.
 */
static int parse_authority(const char *value, struct slice authority, struct slice *host,
                           uint16_t *port, struct meshx_failure *failure) {
    *host = authority;
    const char *end = authority.start + authority.size;
    const char *colon = NULL;
    if (authority.size > 0 && authority.start[0] == '[') {
        const char *bracket = memchr(authority.start, ']', authority.size);
        if (bracket == NULL ||
            !is_ipv6(authority.start + 1, (size_t)(bracket - authority.start - 1))) {
            return address_failure(failure, value, "no IPv6 address in the brackets");
        }
        host->size = (size_t)(bracket + 1 - authority.start);
        if (bracket + 1 < end) {
            if (bracket[1] != ':') {
                return address_failure(failure, value, "no colon after the bracket");
            }
            colon = bracket + 1;
        }
    } else {
        colon = memchr(authority.start, ':', authority.size);
        if (colon != NULL) {
            host->size = (size_t)(colon - authority.start);
            if (memchr(colon + 1, ':', (size_t)(end - colon - 1)) != NULL) {
                return address_failure(failure, value,
                                       "an IPv6 address must be in brackets, [::1]:8500");
            }
        }
        if (host->size == 0 && colon != NULL) {
            /* ":8500" is this host, as in Go's net.Dial(). */
            *host = (struct slice){"127.0.0.1", strlen("127.0.0.1")};
        }
        if (!is_host_name(host->start, host->size)) {
            return address_failure(failure, value, "no host name or address");
        }
    }
    if (colon != NULL && !parse_port(colon + 1, (size_t)(end - colon - 1), port)) {
        return address_failure(failure, value, "the port must be 1 to 65535");
    }
    return MESHX_OK;
}

/* The URL of an agent at a TCP port. |rest| is |value| without its scheme. The default
 * port is shown: who left it out may expect another. */
static int parse_tcp(struct endpoint *endpoint, const char *value, const char *rest,
                     bool secure, uint16_t default_port, struct meshx_failure *failure) {
    /* Before anything is quoted: what stands there may be a password or a token. */
    if (strchr(rest, '@') != NULL) {
        return error_set(failure, MESHX_ECONFIG,
                         "CONSUL_HTTP_ADDR: user and password don't belong into the "
                         "address, set CONSUL_HTTP_AUTH=user:password");
    }
    if (strpbrk(rest, "?#") != NULL) {
        return error_set(failure, MESHX_ECONFIG,
                         "CONSUL_HTTP_ADDR: no query (?) and no fragment (#) allowed in "
                         "the address");
    }
    size_t size = strcspn(rest, "/");
    struct slice host;
    struct buf text = {0};
    int result = parse_authority(value, (struct slice){rest, size}, &host,
                                 &endpoint->port, failure);
    if (result != MESHX_OK) {
        return result;
    }
    size_t prefix = strlen(rest + size);
    while (prefix > 0 && rest[size + prefix - 1] == '/') {
        prefix--;
    }
    for (size_t i = 0; i < prefix; i++) {
        if (rest[size + i] <= ' ' || rest[size + i] >= 0x7F) {
            return address_failure(failure, value, "a character that no URL has");
        }
    }
    bool given = endpoint->port != 0;
    endpoint->port = given ? endpoint->port : default_port;
    result = buf_append(&text, host.start, host.size);
    if (result == MESHX_OK) {
        endpoint->host = buf_take(&text);
        result =
            buf_format(&text, "%s://%s:%u%.*s", secure ? "https" : "http", endpoint->host,
                       (unsigned)endpoint->port, (int)prefix, rest + size);
        endpoint->url = buf_take(&text);
    }
    if (result == MESHX_OK) {
        endpoint->shown = strdup(given ? value : endpoint->url);
    }
    return endpoint->shown != NULL ? MESHX_OK : out_of_memory(failure);
}

/* An agent at a Unix socket: the URL's host only fills the Host header. */
static int parse_unix(struct endpoint *endpoint, const char *value, const char *path,
                      bool secure, struct meshx_failure *failure) {
    if (path[0] == '\0' || strlen(path) >= sizeof((struct sockaddr_un *)NULL)->sun_path) {
        return address_failure(failure, value,
                               "the socket's path must have 1 to 107 bytes");
    }
    endpoint->port = secure ? 443 : 80;
    endpoint->url = strdup(secure ? "https://localhost" : "http://localhost");
    endpoint->host = strdup("localhost");
    endpoint->unix_socket = strdup(path);
    endpoint->shown = strdup(value);
    if (endpoint->url == NULL || endpoint->host == NULL ||
        endpoint->unix_socket == NULL || endpoint->shown == NULL) {
        return out_of_memory(failure);
    }
    return MESHX_OK;
}

static bool is_scheme_of_one_slash(const char *value) {
    static const char *const schemes[] = {"http:/", "https:/", "unix:/"};
    for (size_t i = 0; i < 3; i++) {
        size_t size = strlen(schemes[i]);
        if (strncmp(value, schemes[i], size) == 0 && value[size] != '/') {
            return true;
        }
    }
    return false;
}

static int parse_address(struct endpoint *endpoint, const char *value, bool secure,
                         struct meshx_failure *failure) {
    if (value == NULL) {
        value = DEFAULT_ADDRESS;
    }
    const char *separator = strstr(value, "://");
    size_t word = strspn(value, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ");
    if (is_scheme_of_one_slash(value) && strpbrk(value, "@?#") == NULL) {
        return address_failure(failure, value, "two slashes follow a scheme");
    }
    if (separator == NULL) {
        return parse_tcp(endpoint, value, value, secure, 8500, failure);
    }
    if (strncmp(value, "unix://", 7) == 0) {
        return parse_unix(endpoint, value, separator + 3, secure, failure);
    }
    if (strncmp(value, "http://", 7) == 0 || strncmp(value, "https://", 8) == 0) {
        /* Consul too never goes back to plain text when CONSUL_HTTP_SSL asks for TLS. */
        secure = secure || value[4] == 's';
        return parse_tcp(endpoint, value, separator + 3, secure, secure ? 443 : 80,
                         failure);
    }
    /* Quoted only if it is a word: what else stands there may be a secret. */
    return error_set(failure, MESHX_ECONFIG,
                     "CONSUL_HTTP_ADDR: unknown scheme %.*s://; allowed are "
                     "http://, https:// and unix://",
                     value + word == separator ? (int)word : 0, value);
}

static int unreadable(struct meshx_failure *failure, const char *name, const char *path) {
    char words[128];
    return error_set(failure, MESHX_ECONFIG, "%s=%s: can't be read: %s", name, path,
                     strerror_r(errno, words, sizeof words));
}

/* Opens a file that variable |name| names; not blocking, whatever it turns out to be. */
static int open_file(const char *name, const char *path, bool directory, int *out,
                     struct meshx_failure *failure) {
    struct stat status;
    int fd =
        open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | (directory ? O_DIRECTORY : 0));
    if (fd < 0) {
        goto fail;
    }
    if (fstat(fd, &status) != 0) {
        goto fail;
    }
    if (!directory && S_ISDIR(status.st_mode)) {
        errno = EISDIR;
        goto fail;
    }
    *out = fd;
    return MESHX_OK;

fail:
    (void)unreadable(failure, name, path);
    if (fd >= 0) {
        close(fd);
    }
    return MESHX_ECONFIG;
}

static bool is_space(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* Reads at most |size| bytes into |bytes|. False: errno says why. */
static bool read_all(int fd, char *bytes, size_t size, size_t *out) {
    *out = 0;
    while (*out < size) {
        ssize_t count = read(fd, bytes + *out, size - *out);
        if (count == 0) {
            break;
        }
        if (count < 0 && errno != EINTR) {
            return false;
        }
        *out += count > 0 ? (size_t)count : 0;
    }
    return true;
}

/* Appends the token in the token file to |out|. */
static int read_token_file(const char *path, struct buf *out,
                           struct meshx_failure *failure) {
    char bytes[MAX_TOKEN + 1];
    size_t size = 0;
    int fd = -1;
    int result = open_file("CONSUL_HTTP_TOKEN_FILE", path, false, &fd, failure);
    if (result != MESHX_OK) {
        return result;
    }
    if (!read_all(fd, bytes, sizeof bytes, &size)) {
        result = unreadable(failure, "CONSUL_HTTP_TOKEN_FILE", path);
    }
    close(fd);

    char *token = bytes;
    if (result == MESHX_OK) {
        bool fits = size <= MAX_TOKEN;
        while (size > 0 && is_space(token[size - 1])) {
            size--;
        }
        while (size > 0 && is_space(token[0])) {
            token++;
            size--;
        }
        if (!fits || !is_printable(token, size)) {
            result = error_set(failure, MESHX_ECONFIG,
                               "CONSUL_HTTP_TOKEN_FILE=%s: holds no token, but more than "
                               "%zu bytes or control characters",
                               path, MAX_TOKEN);
        } else if (buf_append(out, token, size) != MESHX_OK) {
            result = out_of_memory(failure);
        }
    }
    explicit_bzero(bytes, sizeof bytes);
    return result;
}

/* Variables that are taken as they are. */
static int read_texts(struct endpoint *endpoint, const struct meshx_setting *settings,
                      struct meshx_failure *failure) {
    enum kind { PLAIN, READABLE_FILE, READABLE_DIRECTORY };
    const struct {
        const char *name;
        char **out;
        enum kind kind;
    } texts[] = {
        {"CONSUL_HTTP_TOKEN", &endpoint->token, PLAIN},
        {"CONSUL_HTTP_TOKEN_FILE", &endpoint->token_file, READABLE_FILE},
        {"CONSUL_CACERT", &endpoint->ca_file, READABLE_FILE},
        {"CONSUL_CAPATH", &endpoint->ca_path, READABLE_DIRECTORY},
        {"CONSUL_CLIENT_CERT", &endpoint->client_cert, READABLE_FILE},
        {"CONSUL_CLIENT_KEY", &endpoint->client_key, READABLE_FILE},
        {"CONSUL_TLS_SERVER_NAME", &endpoint->server_name, PLAIN},
    };
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        const char *value = value_of(settings, texts[i].name);
        if (value == NULL) {
            continue;
        }
        if (texts[i].kind != PLAIN) {
            int fd = -1;
            int result = open_file(texts[i].name, value,
                                   texts[i].kind == READABLE_DIRECTORY, &fd, failure);
            if (result != MESHX_OK) {
                return result;
            }
            close(fd);
        }
        *texts[i].out = strdup(value);
        if (*texts[i].out == NULL) {
            return out_of_memory(failure);
        }
    }
    return MESHX_OK;
}

/* "user:password"; a user alone has an empty password, as in Consul. */
static int read_auth(struct endpoint *endpoint, const struct meshx_setting *settings,
                     struct meshx_failure *failure) {
    const char *value = value_of(settings, "CONSUL_HTTP_AUTH");
    if (value == NULL) {
        return MESHX_OK;
    }
    size_t size = strlen(value);
    bool complete = strchr(value, ':') != NULL;
    endpoint->auth = malloc(size + 2);
    if (endpoint->auth == NULL) {
        return out_of_memory(failure);
    }
    memcpy(endpoint->auth, value, size);
    memcpy(endpoint->auth + size, complete ? "" : ":", complete ? 1 : 2);
    return MESHX_OK;
}

/* "ns=x&partition=y" */
static int read_query(struct endpoint *endpoint, const struct meshx_setting *settings,
                      struct meshx_failure *failure) {
    static const struct {
        const char *name;
        const char *parameter;
    } parts[] = {{"CONSUL_NAMESPACE", "ns="}, {"CONSUL_PARTITION", "partition="}};
    struct buf text = {0};
    int result = MESHX_OK;
    for (size_t i = 0; i < 2 && result == MESHX_OK; i++) {
        const char *value = value_of(settings, parts[i].name);
        if (value == NULL) {
            continue;
        }
        if (text.size > 0) {
            result = buf_append_text(&text, "&");
        }
        if (result == MESHX_OK) {
            result = buf_append_text(&text, parts[i].parameter);
        }
        if (result == MESHX_OK) {
            result = buf_append_escaped(&text, value);
        }
    }
    if (result != MESHX_OK) {
        buf_fini(&text);
        return out_of_memory(failure);
    }
    endpoint->query = buf_take(&text);
    return MESHX_OK;
}

/* What only shows when all variables are known. */
static int check_together(const struct endpoint *endpoint,
                          struct meshx_failure *failure) {
    if (endpoint->token != NULL &&
        !is_printable(endpoint->token, strlen(endpoint->token))) {
        return error_set(
            failure, MESHX_ECONFIG,
            "CONSUL_HTTP_TOKEN: has control characters, perhaps a newline at "
            "its end (the value is not shown)");
    }
    if (endpoint->server_name != NULL &&
        !is_host_name(endpoint->server_name, strlen(endpoint->server_name))) {
        return error_set(failure, MESHX_ECONFIG,
                         "CONSUL_TLS_SERVER_NAME=%s: must be a host name",
                         endpoint->server_name);
    }
    if ((endpoint->client_cert == NULL) != (endpoint->client_key == NULL)) {
        bool has_cert = endpoint->client_cert != NULL;
        return error_set(failure, MESHX_ECONFIG,
                         "%s: is not set, but %s is; set both or none",
                         has_cert ? "CONSUL_CLIENT_KEY" : "CONSUL_CLIENT_CERT",
                         has_cert ? "CONSUL_CLIENT_CERT" : "CONSUL_CLIENT_KEY");
    }
    if (endpoint->token_file != NULL) {
        struct buf token = {0};
        int result = read_token_file(endpoint->token_file, &token, failure);
        if (token.data != NULL) {
            explicit_bzero(token.data, token.size);
        }
        buf_fini(&token);
        return result;
    }
    return MESHX_OK;
}

int endpoint_init(struct endpoint *endpoint, const struct meshx_setting *settings,
                  struct meshx_failure *failure) {
    bool secure = false;
    *endpoint = (struct endpoint){.verify = true};

    int result = parse_boolean(settings, "CONSUL_HTTP_SSL", &secure, failure);
    if (result == MESHX_OK) {
        result =
            parse_boolean(settings, "CONSUL_HTTP_SSL_VERIFY", &endpoint->verify, failure);
    }
    if (result == MESHX_OK) {
        result = parse_address(endpoint, value_of(settings, "CONSUL_HTTP_ADDR"), secure,
                               failure);
    }
    if (result == MESHX_OK) {
        result = read_texts(endpoint, settings, failure);
    }
    if (result == MESHX_OK) {
        result = read_auth(endpoint, settings, failure);
    }
    if (result == MESHX_OK) {
        result = read_query(endpoint, settings, failure);
    }
    if (result == MESHX_OK) {
        result = check_together(endpoint, failure);
    }
    if (result != MESHX_OK) {
        endpoint_fini(endpoint);
    }
    return result;
}

int endpoint_token(const struct endpoint *endpoint, struct buf *out,
                   struct meshx_failure *failure) {
    size_t before = out->size;
    if (endpoint->token_file != NULL) {
        int result = read_token_file(endpoint->token_file, out, failure);
        if (result != MESHX_OK || out->size > before) {
            return result;
        }
    }
    if (endpoint->token != NULL && buf_append_text(out, endpoint->token) != MESHX_OK) {
        return out_of_memory(failure);
    }
    return MESHX_OK;
}

/* Appends the file, unless it can't be read: then the handshake will miss it. */
static int append_file(struct buf *out, const char *directory, const char *name) {
    char part[4096];
    size_t size;
    struct buf path = {0};
    if (buf_format(&path, "%s/%s", directory, name) != MESHX_OK) {
        return MESHX_ENOMEM;
    }
    FILE *file = fopen(buf_text(&path), "re");
    buf_fini(&path);
    int code = MESHX_OK;
    while (file != NULL && code == MESHX_OK &&
           (size = fread(part, 1, sizeof part, file)) > 0) {
        code = buf_append(out, part, size);
    }
    if (file != NULL) {
        (void)fclose(file);
    }
    return code == MESHX_OK ? buf_append_text(out, "\n") : code;
}

int endpoint_certificates(const struct endpoint *endpoint, struct buf *out) {
    const char *path = endpoint->ca_path;
    DIR *directory = path != NULL ? opendir(path) : NULL;
    struct dirent *entry;
    int code = MESHX_OK;
    while (directory != NULL && code == MESHX_OK &&
           (entry = readdir(directory)) != NULL) {
        if (entry->d_name[0] != '.') {
            code = append_file(out, path, entry->d_name);
        }
    }
    if (directory != NULL) {
        closedir(directory);
    }
    return code;
}

static void forget(char *secret) {
    if (secret != NULL) {
        explicit_bzero(secret, strlen(secret));
    }
    free(secret);
}

void endpoint_fini(struct endpoint *endpoint) {
    forget(endpoint->token);
    forget(endpoint->auth);
    free(endpoint->url);
    free(endpoint->unix_socket);
    free(endpoint->shown);
    free(endpoint->token_file);
    free(endpoint->ca_file);
    free(endpoint->ca_path);
    free(endpoint->client_cert);
    free(endpoint->client_key);
    free(endpoint->server_name);
    free(endpoint->host);
    free(endpoint->query);
    *endpoint = (struct endpoint){0};
}
