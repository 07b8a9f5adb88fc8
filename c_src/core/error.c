/*
 * Failures with a text for people. L0, any thread: no state.
 *
 * Invariant: a text is one line of UTF-8, whatever an agent, a library or an operating
 * system put into it (Erlang would refuse the whole text). Control characters become
 * spaces, what is no character a question mark.
 */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char *meshx_error_name(int code) {
    switch (code) {
#define ERROR_NAME(constant, value, name)                                                \
    case constant:                                                                       \
        return #name;
        MESHX_ERRORS(ERROR_NAME)
#undef ERROR_NAME
    default:
        return "unknown";
    }
}

/* The size of the UTF-8 character at |text|; 0: there is none. The NUL ends it, too. */
static size_t character_size(const unsigned char *text) {
    unsigned char lead = text[0];
    /* Of the second byte: neither longer than it need be, nor a surrogate, nor too large.
     */
    unsigned char lowest = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned char highest = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    size_t size = lead < 0x80   ? 1
                  : lead < 0xC2 ? 0
                  : lead < 0xE0 ? 2
                  : lead < 0xF0 ? 3
                  : lead < 0xF5 ? 4
                                : 0;
    for (size_t i = 1; i < size; i++) {
        if (text[i] < lowest || text[i] > highest) {
            return 0;
        }
        lowest = 0x80;
        highest = 0xBF;
    }
    return size;
}

/* |cut|: its last character may not be whole, and goes. */
static void make_line(char *text, bool cut) {
    while (*text != '\0') {
        size_t size = character_size((const unsigned char *)text);
        unsigned char c = (unsigned char)*text;
        if (size == 2 && c == 0xC2 && (unsigned char)text[1] < 0xA0) {
            memset(text, ' ', size); /* U+0080 to U+009F: CSI and its kin */
        }
        if (size > 1) {
            text += size;
            continue;
        }
        if (size == 0 && cut && c >= 0xC0 && strlen(text) < 4) {
            *text = '\0';
            return;
        }
        if (size == 0) {
            *text = '?';
        } else if (c < 0x20 || c == 0x7F) {
            *text = ' ';
        }
        text++;
    }
}

static void set_text(struct meshx_failure *failure, int code, const char *suffix,
                     const char *format, va_list arguments) {
    /* Not written in place: the arguments may include the failure's own former text. */
    char text[sizeof failure->text];
    int length = vsnprintf(text, sizeof text, format, arguments);
    if (length < 0) {
        text[0] = '\0';
        length = 0;
    }
    if (suffix != NULL && (size_t)length < sizeof text) {
        length += snprintf(text + length, sizeof text - (size_t)length, ": %s", suffix);
    }
    make_line(text, (size_t)length >= sizeof text);
    failure->code = code;
    memcpy(failure->text, text, sizeof text);
}

int error_set(struct meshx_failure *failure, int code, const char *format, ...) {
    if (failure != NULL) {
        va_list arguments;
        va_start(arguments, format);
        set_text(failure, code, NULL, format, arguments);
        va_end(arguments);
    }
    return code;
}

int error_set_errno(struct meshx_failure *failure, int error_number, const char *format,
                    ...) {
    if (failure != NULL) {
        char words[128];
        va_list arguments;
        va_start(arguments, format);
        set_text(failure, MESHX_ESYSTEM, strerror_r(error_number, words, sizeof words),
                 format, arguments);
        va_end(arguments);
    }
    return MESHX_ESYSTEM;
}
