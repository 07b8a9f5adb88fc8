/* Records of the guard: every type, every cut, everything that is not one. */
#include "support.h"

#include "record.h"

#include <string.h>

static const uint8_t started[] = {GUARD_STARTED, 0, 0, 0, 4, 0x80, 1, 2, 3};
static const uint8_t exec_failed[] = {GUARD_EXEC_FAILED, 0, 0, 0, 4, 0, 0, 0, 2};
static const uint8_t exited[] = {GUARD_EXITED, 0, 0, 0, 8, 0, 0, 0, 7, 0, 0, 0, 0};
static const uint8_t killed[] = {GUARD_EXITED, 0,    0, 0, 8, 0xFF, 0xFF,
                                 0xFF,         0xFF, 0, 0, 0, 9};
static const uint8_t line[] = {GUARD_STDERR, 0, 0, 0, 3, 'a', 0, 'b'};
static const uint8_t empty_line[] = {GUARD_STDOUT, 0, 0, 0, 0};

static struct record complete(const uint8_t *bytes, size_t size) {
    struct record record;
    for (size_t available = 0; available < size; available++) {
        assert_int_equal(record_next(bytes, available, &record), RECORD_PARTIAL);
    }
    assert_int_equal(record_next(bytes, size, &record), RECORD_COMPLETE);
    assert_int_equal(record.type, bytes[0]);
    assert_int_equal(record.size, size);
    return record;
}

static void reads_every_type(void **state) {
    (void)state;
    assert_true(complete(started, sizeof started).pid == 0x80010203);
    assert_int_equal(complete(exec_failed, sizeof exec_failed).error_number, 2);
    assert_int_equal(complete(exited, sizeof exited).exit_status, 7);
    assert_int_equal(complete(exited, sizeof exited).signal_number, 0);
    assert_int_equal(complete(killed, sizeof killed).exit_status, -1);
    assert_int_equal(complete(killed, sizeof killed).signal_number, 9);
    assert_int_equal(complete(empty_line, sizeof empty_line).line_size, 0);
}

static void ends_a_line_with_nul(void **state) {
    (void)state;
    char text[GUARD_LINE_MAX + 1];
    struct record record = complete(line, sizeof line);
    record_line(&record, text);
    assert_string_equal(text, "a b");
    record = complete(empty_line, sizeof empty_line);
    record_line(&record, text);
    assert_string_equal(text, "");
}

static void reads_the_longest_line(void **state) {
    (void)state;
    static uint8_t bytes[RECORD_MAX_SIZE] = {GUARD_STDOUT, 0, 0, GUARD_LINE_MAX >> 8,
                                             GUARD_LINE_MAX & 0xFF};
    char text[GUARD_LINE_MAX + 1];
    memset(bytes + GUARD_RECORD_HEADER, 'x', GUARD_LINE_MAX);
    struct record record = complete(bytes, sizeof bytes);
    record_line(&record, text);
    assert_int_equal(strlen(text), GUARD_LINE_MAX);
}

static void refuses_what_no_guard_writes(void **state) {
    (void)state;
    struct record record;
    static const uint8_t wrong[][GUARD_RECORD_HEADER] = {
        {0, 0, 0, 0, 4},
        {6, 0, 0, 0, 0},
        {255, 0, 0, 0, 0},
        {GUARD_STARTED, 0, 0, 0, 3},
        {GUARD_STARTED, 0, 0, 0, 8},
        {GUARD_EXEC_FAILED, 0, 0, 0, 0},
        {GUARD_EXITED, 0, 0, 0, 4},
        {GUARD_STDOUT, 0, 0, 0x10, 0x01},
        {GUARD_STDERR, 0xFF, 0xFF, 0xFF, 0xFF},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(record_next(wrong[i], GUARD_RECORD_HEADER, &record),
                         RECORD_INVALID);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_every_type),
        cmocka_unit_test(ends_a_line_with_nul),
        cmocka_unit_test(reads_the_longest_line),
        cmocka_unit_test(refuses_what_no_guard_writes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
