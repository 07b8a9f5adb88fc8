/* What fuzz targets share; see fuzz.h. */
#include "fuzz.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void fuzz_failed(const char *condition, const char *file, int line) {
    fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, condition);
    abort();
}

uint8_t fuzz_byte(struct fuzz_input *input) {
    return (uint8_t)fuzz_number(input, 1);
}

size_t fuzz_number(struct fuzz_input *input, size_t bytes) {
    struct fuzz_input taken = fuzz_take(input, bytes);
    size_t number = 0;
    for (size_t i = 0; i < taken.size; i++) {
        number = number << 8 | taken.bytes[i];
    }
    return number;
}

struct fuzz_input fuzz_take(struct fuzz_input *input, size_t size) {
    struct fuzz_input taken = {input->bytes, size < input->size ? size : input->size};
    input->bytes += taken.size;
    input->size -= taken.size;
    return taken;
}

struct fuzz_input fuzz_until(struct fuzz_input *input, char separator) {
    const uint8_t *end =
        input->size == 0 ? NULL : memchr(input->bytes, separator, input->size);
    struct fuzz_input taken =
        fuzz_take(input, end == NULL ? input->size : (size_t)(end - input->bytes));
    (void)fuzz_byte(input);
    return taken;
}

size_t fuzz_piece(struct fuzz_input sizes, size_t *turn) {
    return sizes.size == 0 ? 1 : sizes.bytes[(*turn)++ % sizes.size];
}

uint8_t *fuzz_block(const uint8_t *bytes, size_t size) {
    uint8_t *block = malloc(size);
    CHECK(block != NULL || size == 0);
    if (size > 0) {
        memcpy(block, bytes, size);
    }
    return block;
}

char *fuzz_text(struct fuzz_input input) {
    char *text = malloc(input.size + 1);
    CHECK(text != NULL);
    if (input.size > 0) {
        memcpy(text, input.bytes, input.size);
    }
    text[input.size] = '\0';
    return text;
}

/* RFC 3629: no surrogates, nothing longer than it need be. */
bool fuzz_is_utf8(const char *text, size_t size) {
    size_t at = 0;
    while (at < size) {
        unsigned char lead = (unsigned char)text[at++];
        size_t more = lead < 0x80   ? 0
                      : lead < 0xC2 ? 4
                      : lead < 0xE0 ? 1
                      : lead < 0xF0 ? 2
                                    : 3;
        unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (more > 3 || lead > 0xF4 || size - at < more) {
            return false;
        }
        for (; more > 0; more--) {
            unsigned char next = (unsigned char)text[at++];
            if (next < low || next > high) {
                return false;
            }
            low = 0x80;
            high = 0xBF;
        }
    }
    return true;
}

void fuzz_check_failure(int code, const struct meshx_failure *failure) {
    size_t length = strnlen(failure->text, sizeof failure->text);
    CHECK(failure->code == code);
    CHECK(length > 0 && length < sizeof failure->text);
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)failure->text[i];
        CHECK(c >= 0x20 && c != 0x7F);
    }
    CHECK(fuzz_is_utf8(failure->text, length));
}
