/*
 * Texts: a failure's text is one line, cut at a character; a buffer holds what was put
 * into it; an escaped name is the same name again. Input: a text.
 */
#include "fuzz.h"

#include "buf.h"
#include "error.h"

#include <curl/curl.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static void check_error(const char *text) {
    struct meshx_failure failure = {0};
    size_t length = strlen(text);
    bool valid = fuzz_is_utf8(text, length);
    CHECK(error_set(&failure, MESHX_ECONFIG, "%s", text) == MESHX_ECONFIG);
    if (length > 0) {
        fuzz_check_failure(MESHX_ECONFIG, &failure);
    }
    size_t kept = strlen(failure.text);
    CHECK(kept == length || (kept < length && kept + 4 >= sizeof failure.text));
    for (size_t i = 0; i < kept; i++) {
        CHECK(failure.text[i] == text[i] || failure.text[i] == ' ' ||
              (failure.text[i] == '?' && !valid));
    }
    /* Its own text is among what it is made of. */
    CHECK(error_set(&failure, MESHX_ESTOPPED, "again: %s", failure.text) ==
          MESHX_ESTOPPED);
    fuzz_check_failure(MESHX_ESTOPPED, &failure);
    CHECK(error_set_errno(&failure, ENOENT, "%s", text) == MESHX_ESYSTEM);
    fuzz_check_failure(MESHX_ESYSTEM, &failure);
}

static void check_escaped(const char *text) {
    struct buf out = {0};
    int size = 0;
    CHECK(buf_append_text(&out, "/") == MESHX_OK);
    CHECK(buf_append_escaped(&out, text) == MESHX_OK);
    CHECK(strlen(buf_text(&out)) == out.size);
    CHECK(strcspn(buf_text(&out) + 1, "/?#&= \r\n") == out.size - 1);
    char *again = curl_easy_unescape(NULL, buf_text(&out) + 1, 0, &size);
    CHECK(again != NULL && (size_t)size == strlen(text) && strcmp(again, text) == 0);
    curl_free(again);
    buf_fini(&out);
}

/* Appends and consumes in turns, as the bytes say, against a plain array. */
static void check_buf(struct fuzz_input input) {
    struct buf buf = {0};
    struct fuzz_input model = {input.bytes, 0};
    while (input.size > 0) {
        size_t step = fuzz_byte(&input);
        size_t end = (size_t)(input.bytes - model.bytes);
        /* |model| is all from its start to |end|: the step's own byte comes, too. */
        CHECK(buf_append(&buf, model.bytes + model.size, end - model.size) == MESHX_OK);
        model.size = end;
        buf_consume(&buf, step / 16);
        size_t gone = step / 16 < model.size ? step / 16 : model.size;
        model.bytes += gone;
        model.size -= gone;
        CHECK(buf.size == model.size);
        CHECK(buf_text(&buf)[buf.size] == '\0');
        CHECK(memcmp(buf_text(&buf), model.bytes, model.size) == 0);
    }
    char *taken = buf_take(&buf);
    CHECK(buf.data == NULL && buf.size == 0);
    free(taken);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fuzz_input input = {data, size};
    char *text = fuzz_text(input);
    check_error(text);
    check_escaped(text);
    check_buf(input);
    free(text);
    return 0;
}
