# meshx_node. `make` builds; `make demo` and `make test` are the two commands of the README.

CC ?= cc
ERL ?= erl
REBAR3 ?= rebar3
PKG_CONFIG ?= pkg-config
BUILD := _build/c

PACKAGES := libcurl jansson libuv
PACKAGE_CFLAGS = $(shell $(PKG_CONFIG) --cflags $(PACKAGES))
PACKAGE_LIBS = $(shell $(PKG_CONFIG) --libs $(PACKAGES))

WARNINGS := -Wall -Wextra -Werror -Wstrict-prototypes -Wmissing-prototypes -Wwrite-strings \
	-Wshadow -Wconversion
CFLAGS_release := -O2 -g -DNDEBUG
CFLAGS_asan := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
CFLAGS_tsan := -O1 -g -fsanitize=thread
CFLAGS_all = -std=c11 -D_GNU_SOURCE -fPIC -fvisibility=hidden -pthread -MMD -MP $(WARNINGS) \
	-Iinclude -Ic_src/core -Ic_src/guard $(PACKAGE_CFLAGS)

CORE_SOURCES := $(wildcard c_src/core/*.c)
C_TESTS := $(patsubst test/c/%_test.c,%,$(wildcard test/c/*_test.c))
# Modules with threads or a loop also run under ThreadSanitizer.
TSAN_TESTS := $(filter loop http consul probe sidecar mesh,$(C_TESTS))
C_TEST_SUPPORT := $(filter-out %_test.c,$(wildcard test/c/*.c))

.SECONDARY:

# $(1): release, asan or tsan
define variant
$(BUILD)/$(1)/core/%.o: c_src/core/%.c
	@mkdir -p $$(@D)
	$$(CC) $$(CFLAGS_$(1)) $$(CFLAGS_all) -c $$< -o $$@
$(BUILD)/$(1)/libmeshx_core.a: $$(CORE_SOURCES:c_src/core/%.c=$(BUILD)/$(1)/core/%.o)
	@rm -f $$@
	$$(AR) rcs $$@ $$^
$(BUILD)/$(1)/meshx_guard: c_src/guard/meshx_guard.c c_src/guard/guard_record.h
	@mkdir -p $$(@D)
	$$(CC) $$(CFLAGS_$(1)) $$(filter-out -fPIC,$$(CFLAGS_all)) $$< -o $$@
$(BUILD)/$(1)/test/%.o: test/c/%.c
	@mkdir -p $$(@D)
	$$(CC) $$(CFLAGS_$(1)) $$(CFLAGS_all) -Itest/c -c $$< -o $$@
$(BUILD)/$(1)/test/%_test: $(BUILD)/$(1)/test/%_test.o \
		$$(C_TEST_SUPPORT:test/c/%.c=$(BUILD)/$(1)/test/%.o) $(BUILD)/$(1)/libmeshx_core.a
	$$(CC) $$(CFLAGS_$(1)) -pthread $$^ -o $$@ $$(PACKAGE_LIBS) -lcmocka \
		-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=strdup
endef
$(foreach v,release asan tsan,$(eval $(call variant,$(v))))

# One module's tests: make test-c-frame (ASan+UBSan), make test-c-tsan-loop (TSan).
test-c-tsan-%: $(BUILD)/tsan/test/%_test $(BUILD)/tsan/meshx_guard
	MESHX_GUARD=$(BUILD)/tsan/meshx_guard $<
test-c-%: $(BUILD)/asan/test/%_test $(BUILD)/asan/meshx_guard
	MESHX_GUARD=$(BUILD)/asan/meshx_guard $<

-include $(wildcard $(BUILD)/*/*/*.d)
