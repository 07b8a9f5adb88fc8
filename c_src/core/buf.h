/*
 * A growable run of bytes that always ends with a NUL that does not count. L0.
 *
 * Owner: whoever embeds it; one thread at a time. An all-zero struct buf is a valid empty
 * one.
 */
#ifndef MESHX_CORE_BUF_H
#define MESHX_CORE_BUF_H

#include <stddef.h>

struct buf {
    char *data; /* NULL while nothing was ever added */
    size_t size;
    size_t capacity;
};

/* Appends |size| bytes. MESHX_OK, or MESHX_ENOMEM with the buffer unchanged. */
int buf_append(struct buf *buf, const void *data, size_t size);

/* Appends a NUL-terminated string. As buf_append(). */
int buf_append_text(struct buf *buf, const char *text);

/* Appends formatted text. As buf_append(). */
int buf_format(struct buf *buf, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Appends |text| percent-encoded: all but RFC 3986 "unreserved" characters. As
 * buf_append(). */
int buf_append_escaped(struct buf *buf, const char *text);

/* The bytes as a NUL-terminated string, "" for an empty buffer. Borrowed. */
const char *buf_text(const struct buf *buf);

/* Removes the first |size| bytes (at most all). Keeps the memory. */
void buf_consume(struct buf *buf, size_t size);

/* Gives the bytes away (steal: the caller frees; NULL if nothing was added); empty after.
 */
char *buf_take(struct buf *buf);

/* Frees; an empty buffer after. */
void buf_fini(struct buf *buf);

#endif
