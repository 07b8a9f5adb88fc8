/*
 * Failures with a text for people. L0, any thread: no state.
 *
 * Invariant: a text is one line of valid length, whatever an agent or an operating system
 * put into it. Control characters become spaces, and a cut never leaves half a UTF-8
 * character behind (Erlang would refuse the whole text).
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

/* The length of |text| without a UTF-8 character that was cut at its end. */
static size_t whole_characters(const char *text, size_t length) {
    size_t lead = length;
    while (lead > 0 && length - lead < 4 &&
           ((unsigned char)text[lead - 1] & 0xC0) == 0x80) {
        lead--;
    }
    if (lead == 0) {
        return length;
    }
    unsigned char first = (unsigned char)text[lead - 1];
    size_t expected = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : first >= 0xC0 ? 2 : 1;
    return length - lead + 1 < expected ? lead - 1 : length;
}

static void make_line(char *text) {
    for (; *text != '\0'; text++) {
        unsigned char c = (unsigned char)*text;
        if (c < 0x20 || c == 0x7F) {
            *text = ' ';
        }
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
    if ((size_t)length >= sizeof text) {
        text[whole_characters(text, sizeof text - 1)] = '\0';
    }
    make_line(text);
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
