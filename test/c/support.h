/*
 * What every C test shares: cmocka with its headers in the order it needs, and a way to
 * let the n-th allocation of the core fail (ld --wrap, so production code has no hook).
 */
#ifndef MESHX_TEST_SUPPORT_H
#define MESHX_TEST_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>
#include <cmocka.h>

/* From now on the |nth| (1 = next) allocation fails, once. 0: none. Counts anew. Calls
 * from any thread count; calls within shared libraries (jansson, curl, libuv) do not. */
void allocation_fail(unsigned nth);

/* Whether the failure asked for has happened. When a whole run of the code under test
 * never reached it, every allocation has been failed once. */
bool allocation_failed(void);

#endif
