/*
 * What fuzz targets share: taking an input apart, and checking. A target is one file,
 * <name>_fuzz.c; it states what must hold for every input, and libFuzzer looks for one
 * that breaks it or makes a sanitizer report. Seeds are in corpus/<name>, words that are
 * worth trying in <name>.dict.
 */
#ifndef MESHX_TEST_FUZZ_H
#define MESHX_TEST_FUZZ_H

#include "meshx_node.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Ends the run, libFuzzer keeps the input. */
#define CHECK(condition)                                                                 \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            fuzz_failed(#condition, __FILE__, __LINE__);                                 \
        }                                                                                \
    } while (0)

_Noreturn void fuzz_failed(const char *condition, const char *file, int line);

/* What is left of an input. */
struct fuzz_input {
    const uint8_t *bytes;
    size_t size;
};

/* Takes one byte, a big-endian number of |bytes| bytes, or the next |size| bytes; zeros
 * and less at the input's end. */
uint8_t fuzz_byte(struct fuzz_input *input);
size_t fuzz_number(struct fuzz_input *input, size_t bytes);
struct fuzz_input fuzz_take(struct fuzz_input *input, size_t size);

/* Takes what stands before the next |separator|, and that. */
struct fuzz_input fuzz_until(struct fuzz_input *input, char separator);

/* The size of the next piece of a stream, from a list of sizes that is gone through in
 * turns; 1 when there is none. */
size_t fuzz_piece(struct fuzz_input sizes, size_t *turn);

/* The bytes in a block of just their size, so that AddressSanitizer sees a read beyond;
 * as a text, ended by a NUL. New: free(). */
uint8_t *fuzz_block(const uint8_t *bytes, size_t size);
char *fuzz_text(struct fuzz_input input);

bool fuzz_is_utf8(const char *text, size_t size);

/* Of the failure that |code| was returned for: the same code and one line of UTF-8. */
void fuzz_check_failure(int code, const struct meshx_failure *failure);

#endif
