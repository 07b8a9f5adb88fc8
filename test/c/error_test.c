/* Failures: names of the codes, texts that stay one valid line whatever goes in. */
#include "support.h"
#include "error.h"

#include <errno.h>
#include <string.h>

static void names(void **state) {
    (void)state;
#define CHECK_NAME(constant, value, name)                                                \
    assert_string_equal(meshx_error_name(constant), #name);                              \
    assert_int_equal(constant, value);
    MESHX_ERRORS(CHECK_NAME)
#undef CHECK_NAME
    assert_string_equal(meshx_error_name(1), "unknown");
    assert_string_equal(meshx_error_name(-9999), "unknown");
}

static void sets_code_and_text(void **state) {
    (void)state;
    struct meshx_failure failure = {0};
    assert_int_equal(error_set(&failure, MESHX_ECONFIG, "%s is %d", "ttl", 0),
                     MESHX_ECONFIG);
    assert_int_equal(failure.code, MESHX_ECONFIG);
    assert_string_equal(failure.text, "ttl is 0");
}

static void accepts_no_failure(void **state) {
    (void)state;
    assert_int_equal(error_set(NULL, MESHX_EDENIED, "%s", "x"), MESHX_EDENIED);
    assert_int_equal(error_set_errno(NULL, EIO, "%s", "x"), MESHX_ESYSTEM);
}

static void adds_words_of_errno(void **state) {
    (void)state;
    struct meshx_failure failure = {0};
    assert_int_equal(error_set_errno(&failure, ENOENT, "can't open %s", "/x"),
                     MESHX_ESYSTEM);
    assert_int_equal(failure.code, MESHX_ESYSTEM);
    assert_string_equal(failure.text, "can't open /x: No such file or directory");
}

static void may_quote_its_own_text(void **state) {
    (void)state;
    struct meshx_failure failure = {0};
    error_set(&failure, MESHX_ESYSTEM, "first");
    error_set(&failure, MESHX_ECONFIG, "because %s", failure.text);
    assert_string_equal(failure.text, "because first");
}

static void stays_one_line(void **state) {
    (void)state;
    struct meshx_failure failure = {0};
    error_set(&failure, MESHX_ECONFIG, "a\r\nb\tc\x7f\x1b[0m \xc3\xa4");
    assert_string_equal(failure.text, "a  b c  [0m \xc3\xa4");
    error_set(&failure, MESHX_ECONFIG,
              "a\xc2\x80\xc2\x9b"
              "0m\xc2\xa0\xc2\x9f");
    assert_string_equal(failure.text, "a    0m\xc2\xa0  ");
}

static void cuts_long_text(void **state) {
    (void)state;
    struct meshx_failure failure = {0};
    char text[2000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    error_set(&failure, MESHX_ECONFIG, "%s", text);
    assert_int_equal(strlen(failure.text), sizeof failure.text - 1);
    assert_memory_equal(failure.text, text, sizeof failure.text - 1);

    /* Just full, then just over, with errno's words. */
    memset(&failure, 0, sizeof failure);
    error_set_errno(&failure, EIO, "%.*s", 1017, text);
    assert_int_equal(strlen(failure.text), 1023);
    assert_string_equal(failure.text + 1017, ": Inpu");
    error_set_errno(&failure, EIO, "%.*s", 1100, text);
    assert_int_equal(strlen(failure.text), 1023);
}

/* A character of 2, 3 and 4 bytes at every place around the cut. */
static void cuts_between_characters(void **state) {
    (void)state;
    static const char *const characters[] = {"\xc3\xa4", "\xe2\x82\xac",
                                             "\xf0\x9f\x98\x80"};
    for (size_t c = 0; c < 3; c++) {
        size_t size = strlen(characters[c]);
        for (size_t before = 1012; before <= 1024; before++) {
            struct meshx_failure failure = {0};
            char text[1100];
            memset(text, 'x', sizeof text);
            memcpy(text + before, characters[c], size);
            text[1099] = '\0';
            error_set(&failure, MESHX_ECONFIG, "%s", text);
            size_t expected = before >= 1023 || before + size <= 1023 ? 1023 : before;
            assert_int_equal(strlen(failure.text), expected);
        }
    }
    /* Not UTF-8 at all: nothing to save, but nothing read out of bounds. */
    struct meshx_failure failure = {0};
    char text[1100];
    memset(text, 0x80, sizeof text);
    text[1099] = '\0';
    error_set(&failure, MESHX_ECONFIG, "%s", text);
    assert_int_equal(strlen(failure.text), 1023);
    assert_int_equal(strspn(failure.text, "?"), 1023);
}

/* As an agent's error page, or jansson's quote of half a character, may have it. */
static void replaces_what_is_not_utf8(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"caf\xe9 \xc3\xa9", "caf? \xc3\xa9"},
        {"near '\\\xcc'", "near '\\?'"},
        {"\xc0\xaf \xe0\x80\xaf", "?? ???"},
        {"\xed\xa0\x80 \xf4\x90\x80\x80", "??? ????"},
        {"\xff\xfe", "??"},
        {"\xe2\x82", "??"},
        {"\xef\xbf\xbd \xf4\x8f\xbf\xbf", "\xef\xbf\xbd \xf4\x8f\xbf\xbf"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct meshx_failure failure = {0};
        error_set(&failure, MESHX_EAGENT_ANSWER, "%s", cases[i][0]);
        assert_string_equal(failure.text, cases[i][1]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names),
        cmocka_unit_test(sets_code_and_text),
        cmocka_unit_test(accepts_no_failure),
        cmocka_unit_test(adds_words_of_errno),
        cmocka_unit_test(may_quote_its_own_text),
        cmocka_unit_test(stays_one_line),
        cmocka_unit_test(cuts_long_text),
        cmocka_unit_test(cuts_between_characters),
        cmocka_unit_test(replaces_what_is_not_utf8),
    };
    return cmocka_run_group_tests_name("error", tests, NULL, NULL);
}
