#include "support.h"
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_uint countdown;
static atomic_bool failed;

void allocation_fail(unsigned nth) {
    atomic_store(&failed, false);
    atomic_store(&countdown, nth);
}

bool allocation_failed(void) {
    return atomic_load(&failed);
}

static bool refuse(void) {
    unsigned left = atomic_load(&countdown);
    while (left > 0 && !atomic_compare_exchange_weak(&countdown, &left, left - 1)) {
    }
    if (left != 1) {
        return false;
    }
    atomic_store(&failed, true);
    return true;
}

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *pointer, size_t size);
char *__real_strdup(const char *text);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *pointer, size_t size);
char *__wrap_strdup(const char *text);

void *__wrap_malloc(size_t size) {
    return refuse() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size) {
    return refuse() ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *pointer, size_t size) {
    return refuse() ? NULL : __real_realloc(pointer, size);
}

char *__wrap_strdup(const char *text) {
    return refuse() ? NULL : __real_strdup(text);
}

#ifdef __SANITIZE_THREAD__
/*
 * libuv closes descriptors by syscall(SYS_close, fd), which ThreadSanitizer does not see:
 * when another thread then gets the same number from the kernel, it reports a race that
 * is none (github.com/google/sanitizers/issues/1376). This takes syscall()'s place for
 * libuv and lets it see.
 */
__attribute__((visibility("default"))) long syscall(long number, ...) {
    long arguments[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) {
        arguments[i] = va_arg(list, long);
    }
    va_end(list);
    if (number == SYS_close) {
        return close((int)arguments[0]);
    }
    long (*real)(long, ...) = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return real(number, arguments[0], arguments[1], arguments[2], arguments[3],
                arguments[4], arguments[5]);
}
#endif
