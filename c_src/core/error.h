/*
 * Failures with a text for people. L0, no thread of its own.
 *
 * Every function of the core that can fail for a reason a user should read takes a
 * struct meshx_failure * and returns the same code. NULL is allowed: only the code
 * counts.
 */
#ifndef MESHX_CORE_ERROR_H
#define MESHX_CORE_ERROR_H

#include "meshx_node.h"

/* Fills |failure| (may be NULL) and returns |code|. A text that does not fit is cut,
 * and what is not UTF-8 in it replaced. */
int error_set(struct meshx_failure *failure, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The same with strerror(|error_number|) after the text. Code is MESHX_ESYSTEM. */
int error_set_errno(struct meshx_failure *failure, int error_number, const char *format,
                    ...) __attribute__((format(printf, 3, 4)));

#endif
