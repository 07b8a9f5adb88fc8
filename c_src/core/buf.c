/*
 * A growable run of bytes. L0, one thread at a time.
 *
 * Invariant: |data| is NULL, or capacity > size and data[size] is NUL. The capacity
 * doubles, so appending byte by byte stays linear.
 */
#include "buf.h"
#include "meshx_node.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIN_CAPACITY ((size_t)64)

/* Makes room for |more| bytes and the NUL. */
static int reserve(struct buf *buf, size_t more) {
    if (more >= SIZE_MAX - buf->size) {
        return MESHX_ENOMEM;
    }
    size_t wanted = buf->size + more + 1;
    if (wanted <= buf->capacity) {
        return MESHX_OK;
    }
    size_t capacity = buf->capacity > SIZE_MAX / 2 ? SIZE_MAX : buf->capacity * 2;
    if (capacity < wanted) {
        capacity = wanted;
    }
    if (capacity < MIN_CAPACITY) {
        capacity = MIN_CAPACITY;
    }
    char *data = realloc(buf->data, capacity);
    if (data == NULL) {
        return MESHX_ENOMEM;
    }
    data[buf->size] = '\0';
    buf->data = data;
    buf->capacity = capacity;
    return MESHX_OK;
}

int buf_append(struct buf *buf, const void *data, size_t size) {
    if (size == 0) {
        return MESHX_OK;
    }
    if (reserve(buf, size) != MESHX_OK) {
        return MESHX_ENOMEM;
    }
    memcpy(buf->data + buf->size, data, size);
    buf->size += size;
    buf->data[buf->size] = '\0';
    return MESHX_OK;
}

int buf_append_text(struct buf *buf, const char *text) {
    return buf_append(buf, text, strlen(text));
}

int buf_format(struct buf *buf, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    if (length == 0) {
        return MESHX_OK;
    }
    /* Negative: longer than an int can say; as good as out of memory. */
    if (length < 0 || reserve(buf, (size_t)length) != MESHX_OK) {
        return MESHX_ENOMEM;
    }
    va_start(arguments, format);
    vsnprintf(buf->data + buf->size, (size_t)length + 1, format, arguments);
    va_end(arguments);
    buf->size += (size_t)length;
    return MESHX_OK;
}

/* RFC 3986, 2.3. Not isalnum(): the locale must not matter. */
static bool is_unreserved(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           c == '-' || c == '.' || c == '_' || c == '~';
}

int buf_append_escaped(struct buf *buf, const char *text) {
    static const char hex[] = "0123456789ABCDEF";
    size_t length = strlen(text);
    if (length == 0) {
        return MESHX_OK;
    }
    /* All room at once, so that a failure leaves the buffer unchanged. */
    if (length > SIZE_MAX / 3 || reserve(buf, length * 3) != MESHX_OK) {
        return MESHX_ENOMEM;
    }
    char *out = buf->data + buf->size;
    for (; *text != '\0'; text++) {
        if (is_unreserved(*text)) {
            *out++ = *text;
        } else {
            unsigned char c = (unsigned char)*text;
            *out++ = '%';
            *out++ = hex[c >> 4];
            *out++ = hex[c & 15];
        }
    }
    *out = '\0';
    buf->size = (size_t)(out - buf->data);
    return MESHX_OK;
}

const char *buf_text(const struct buf *buf) {
    return buf->data == NULL ? "" : buf->data;
}

void buf_consume(struct buf *buf, size_t size) {
    if (size > buf->size) {
        size = buf->size;
    }
    if (size > 0) {
        buf->size -= size;
        memmove(buf->data, buf->data + size, buf->size + 1);
    }
}

char *buf_take(struct buf *buf) {
    char *data = buf->data;
    *buf = (struct buf){0};
    return data;
}

void buf_fini(struct buf *buf) {
    free(buf->data);
    *buf = (struct buf){0};
}
