/* The growable buffer: contents, the uncounted NUL, what happens without memory. */
#include "support.h"
#include "buf.h"
#include "meshx_node.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void empty(void **state) {
    (void)state;
    struct buf buf = {0};
    assert_string_equal(buf_text(&buf), "");
    assert_int_equal(buf_append(&buf, NULL, 0), MESHX_OK);
    assert_int_equal(buf_append_text(&buf, ""), MESHX_OK);
    assert_int_equal(buf_append_escaped(&buf, ""), MESHX_OK);
    assert_int_equal(buf_format(&buf, "%s", ""), MESHX_OK);
    buf_consume(&buf, 10);
    assert_null(buf_take(&buf));
    buf_fini(&buf);
    buf_fini(&buf);
}

static void appends_bytes(void **state) {
    (void)state;
    struct buf buf = {0};
    for (unsigned i = 0; i < 10000; i++) {
        unsigned char byte = (unsigned char)(i * 7);
        assert_int_equal(buf_append(&buf, &byte, 1), MESHX_OK);
        assert_int_equal(buf.size, i + 1);
        assert_int_equal(buf.data[buf.size], 0);
    }
    for (unsigned i = 0; i < 10000; i++) {
        assert_int_equal((unsigned char)buf.data[i], (unsigned char)(i * 7));
    }
    buf_fini(&buf);
    assert_null(buf.data);
    assert_int_equal(buf.size, 0);
    assert_int_equal(buf.capacity, 0);
}

static void formats(void **state) {
    (void)state;
    struct buf buf = {0};
    assert_int_equal(buf_append_text(&buf, "a="), MESHX_OK);
    assert_int_equal(buf_format(&buf, "%d&%s", 12, "b"), MESHX_OK);
    assert_string_equal(buf_text(&buf), "a=12&b");

    char text[300];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    assert_int_equal(buf_format(&buf, "%s", text), MESHX_OK);
    assert_int_equal(buf.size, 6 + 299);
    assert_string_equal(buf_text(&buf) + 6, text);
    buf_fini(&buf);
}

static void refuses_what_no_memory_can_hold(void **state) {
    (void)state;
    struct buf buf = {0};
    assert_int_equal(buf_append_text(&buf, "kept"), MESHX_OK);
    assert_int_equal(buf_append(&buf, "x", SIZE_MAX), MESHX_ENOMEM);
    assert_int_equal(buf_append(&buf, "x", SIZE_MAX - 4), MESHX_ENOMEM);
    /* Longer than printf can count; volatile, or the compiler sees it coming. */
    volatile int width = INT_MAX;
    assert_int_equal(buf_format(&buf, "%*s%*s", width, "", width, ""), MESHX_ENOMEM);
    assert_string_equal(buf_text(&buf), "kept");
    buf_fini(&buf);
}

static void escapes(void **state) {
    (void)state;
    struct buf buf = {0};
    assert_int_equal(buf_append_escaped(&buf, "node1@my-host.x_~Z09"), MESHX_OK);
    assert_string_equal(buf_text(&buf), "node1%40my-host.x_~Z09");
    buf_consume(&buf, buf.size);
    assert_int_equal(buf_append_escaped(&buf, "a b/c%?&=#\xc3\xa4\x01"), MESHX_OK);
    assert_string_equal(buf_text(&buf), "a%20b%2Fc%25%3F%26%3D%23%C3%A4%01");
    buf_fini(&buf);

    for (int c = 1; c < 256; c++) {
        char text[2] = {(char)c, '\0'};
        assert_int_equal(buf_append_escaped(&buf, text), MESHX_OK);
        bool plain =
            strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
                   "-._~",
                   c) != NULL;
        char expected[4];
        snprintf(expected, sizeof expected, plain ? "%c" : "%%%02X", c);
        assert_string_equal(buf_text(&buf), expected);
        buf_consume(&buf, SIZE_MAX);
    }
    buf_fini(&buf);
}

static void consumes(void **state) {
    (void)state;
    struct buf buf = {0};
    assert_int_equal(buf_append_text(&buf, "abcdef"), MESHX_OK);
    size_t capacity = buf.capacity;
    buf_consume(&buf, 0);
    assert_string_equal(buf_text(&buf), "abcdef");
    buf_consume(&buf, 2);
    assert_string_equal(buf_text(&buf), "cdef");
    assert_int_equal(buf.size, 4);
    buf_consume(&buf, 5);
    assert_string_equal(buf_text(&buf), "");
    assert_int_equal(buf.size, 0);
    assert_int_equal(buf.capacity, capacity);
    buf_fini(&buf);
}

static void gives_away(void **state) {
    (void)state;
    struct buf buf = {0};
    assert_int_equal(buf_append_text(&buf, "mine"), MESHX_OK);
    char *taken = buf_take(&buf);
    assert_string_equal(taken, "mine");
    assert_string_equal(buf_text(&buf), "");
    assert_int_equal(buf_append_text(&buf, "new"), MESHX_OK);
    assert_string_equal(taken, "mine");
    free(taken);
    buf_fini(&buf);
}

static int append_some(struct buf *buf) {
    char text[100];
    memset(text, '/', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    int result = buf_append_text(buf, "first");
    if (result == MESHX_OK) {
        result = buf_append(buf, text, sizeof text);
    }
    if (result == MESHX_OK) {
        result = buf_append_escaped(buf, text);
    }
    if (result == MESHX_OK) {
        result = buf_format(buf, "%500d", 1);
    }
    return result;
}

static void survives_without_memory(void **state) {
    (void)state;
    static const size_t sizes[] = {0, 5, 105, 402};
    unsigned nth = 1;
    for (;; nth++) {
        struct buf buf = {0};
        allocation_fail(nth);
        int result = append_some(&buf);
        bool failed = allocation_failed();
        allocation_fail(0);
        if (failed) {
            /* Unchanged by the call that failed. */
            assert_int_equal(result, MESHX_ENOMEM);
            assert_in_range(nth, 1, 4);
            assert_int_equal(buf.size, sizes[nth - 1]);
            if (buf.data != NULL) {
                assert_int_equal(buf.data[buf.size], 0);
            }
        } else {
            assert_int_equal(result, MESHX_OK);
            assert_int_equal(buf.size, 902);
        }
        buf_fini(&buf);
        if (!failed) {
            break;
        }
    }
    assert_int_equal(nth, 5);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(empty),      cmocka_unit_test(appends_bytes),
        cmocka_unit_test(formats),    cmocka_unit_test(refuses_what_no_memory_can_hold),
        cmocka_unit_test(escapes),    cmocka_unit_test(consumes),
        cmocka_unit_test(gives_away), cmocka_unit_test(survives_without_memory),
    };
    return cmocka_run_group_tests_name("buf", tests, NULL, NULL);
}
