# meshx_node. `make help` lists the targets; `make demo` and `make test` are the two of the README.

CC ?= cc
ERL ?= erl
REBAR3 ?= rebar3
PKG_CONFIG ?= pkg-config
HOME ?= $(CURDIR)/_build/home
export HOME
MAKEFLAGS += --no-builtin-rules --no-print-directory
BUILD := _build/c
# V=1 shows the commands of the C build.
Q := $(if $(V),,@)
# rebar3 calls make again (rebar.config's hooks); that one is no part of this one.
REBAR := env -u MAKEFLAGS -u MAKELEVEL $(REBAR3)

CORE := $(wildcard c_src/core/*.c)
NIF := $(wildcard c_src/nif/*.c)
GUARD := $(wildcard c_src/guard/*.c)
C_TESTS := $(patsubst test/c/%_test.c,%,$(wildcard test/c/*_test.c))
# Modules with threads or a loop also run under ThreadSanitizer.
TSAN_TESTS := $(filter loop% http% consul% probe% sidecar% mesh%,$(C_TESTS))
C_TEST_SUPPORT := $(filter-out %_test.c,$(wildcard test/c/*.c))
FUZZ := $(patsubst test/fuzz/%_fuzz.c,%,$(wildcard test/fuzz/*_fuzz.c))
FUZZ_SUPPORT := $(filter-out %_fuzz.c,$(wildcard test/fuzz/*.c))
C_SOURCES := $(CORE) $(NIF) $(GUARD)
C_FILES := $(C_SOURCES) $(wildcard c_src/*/*.h include/*.h test/c/*.[ch] test/fuzz/*.[ch] test/bench/*.c)

WARNINGS := -Wall -Wextra -Wstrict-prototypes -Wmissing-prototypes -Wwrite-strings -Wshadow -Wconversion
OWN_CFLAGS := -std=c11 -D_GNU_SOURCE -fPIC -fvisibility=hidden -pthread $(WARNINGS) \
	-Iinclude -Ic_src/core -Ic_src/guard
CFLAGS_release := -O2 -g -DNDEBUG
CFLAGS_asan := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
CFLAGS_tsan := -O1 -g -fsanitize=thread
# libFuzzer is clang's.
CC_fuzz := clang
CFLAGS_fuzz := -O1 -g -fno-omit-frame-pointer -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined

# Sets PACKAGE_CFLAGS, PACKAGE_LIBS and ERL_CFLAGS; newer than the objects when any flag, the
# compiler or the Erlang has changed since.
CONFIG := $(BUILD)/config.mk
$(shell CC='$(CC)' ERL='$(ERL)' PKG_CONFIG='$(PKG_CONFIG)' .ci/configure $(CONFIG) \
	'$(OWN_CFLAGS) $(CFLAGS_release) $(CFLAGS_asan) $(CFLAGS_tsan) $(CFLAGS_fuzz) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS)')
include $(CONFIG)
CFLAGS_all = $(OWN_CFLAGS) $(PACKAGE_CFLAGS) $(CPPFLAGS) $(CFLAGS)

all: native ## build the NIF, the guard and, if there is a rebar3, the Erlang modules (default)
	@if command -v $(REBAR3) >/dev/null; then $(REBAR) compile; \
	else echo 'no $(REBAR3): only the C part is built; make deps installs what is missing'; fi

native: priv/meshx_node.so priv/meshx_guard ## build the C part only (rebar3 compile calls this)
	@:

# ---- C. $(1) is release, asan, tsan or fuzz, each with a folder of its own.
.SECONDARY:
define variant
$(BUILD)/$(1)/core/%.o: c_src/core/%.c $(CONFIG)
	@mkdir -p $$(@D)
	@echo '  CC  $$@'
	$$(Q)$$(or $$(CC_$(1)),$$(CC)) $$(CFLAGS_$(1)) $$(CFLAGS_all) -MMD -MP -c $$< -o $$@
$(BUILD)/$(1)/libmeshx_core.a: $$(CORE:c_src/%.c=$(BUILD)/$(1)/%.o) c_src/core
	@rm -f $$@
	$$(Q)$$(AR) rcs $$@ $$(filter %.o,$$^)
$(BUILD)/$(1)/nif/%.o: c_src/nif/%.c $(CONFIG)
	@mkdir -p $$(@D)
	@echo '  CC  $$@'
	$$(Q)$$(or $$(CC_$(1)),$$(CC)) $$(CFLAGS_$(1)) $$(CFLAGS_all) $$(ERL_CFLAGS) -MMD -MP -c $$< -o $$@
# nodelete: threads of the libraries may still be in their last frames when the VM unloads us.
$(BUILD)/$(1)/meshx_node.so: $$(NIF:c_src/%.c=$(BUILD)/$(1)/%.o) $(BUILD)/$(1)/libmeshx_core.a c_src/nif
	@echo '  CC  $$@'
	$$(Q)$$(or $$(CC_$(1)),$$(CC)) $$(CFLAGS_$(1)) -shared -pthread -Wl,-z,nodelete $$(LDFLAGS) $$(filter %.o %.a,$$^) -o $$@ $$(PACKAGE_LIBS)
$(BUILD)/$(1)/meshx_guard: $$(GUARD) $$(wildcard c_src/guard/*.h) $(CONFIG)
	@mkdir -p $$(@D)
	@echo '  CC  $$@'
	$$(Q)$$(or $$(CC_$(1)),$$(CC)) $$(CFLAGS_$(1)) $$(filter-out -fPIC,$$(CFLAGS_all)) $$(GUARD) $$(LDFLAGS) -o $$@
$(BUILD)/$(1)/test/%.o: test/c/%.c $(CONFIG)
	@mkdir -p $$(@D)
	@echo '  CC  $$@'
	$$(Q)$$(or $$(CC_$(1)),$$(CC)) $$(CFLAGS_$(1)) $$(CFLAGS_all) -Itest/c -MMD -MP -c $$< -o $$@
# An archive too, so that a test links only what it uses.
$(BUILD)/$(1)/libmeshx_test.a: $$(C_TEST_SUPPORT:test/c/%.c=$(BUILD)/$(1)/test/%.o) test/c
	@rm -f $$@
	$$(Q)$$(AR) rcs $$@ $$(filter %.o,$$^)
$(BUILD)/$(1)/test/%_test: $(BUILD)/$(1)/test/%_test.o $(BUILD)/$(1)/libmeshx_test.a $(BUILD)/$(1)/libmeshx_core.a
	@echo '  CC  $$@'
	$$(Q)$$(or $$(CC_$(1)),$$(CC)) $$(CFLAGS_$(1)) -pthread $$(LDFLAGS) -Wl,--start-group $$^ -Wl,--end-group -o $$@ $$(PACKAGE_LIBS) -lcmocka \
		-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=strdup
endef
$(foreach v,release asan tsan fuzz,$(eval $(call variant,$(v))))

# Fuzz targets may include a .c of c_src: what is static there is under test, too.
$(BUILD)/fuzz/fuzz/%.o: test/fuzz/%.c $(CONFIG)
	@mkdir -p $(@D)
	@echo '  CC  $@'
	$(Q)$(CC_fuzz) $(CFLAGS_fuzz) $(CFLAGS_all) $(ERL_CFLAGS) -Ic_src/nif -MMD -MP -c $< -o $@
$(BUILD)/fuzz/libmeshx_fuzz.a: $(FUZZ_SUPPORT:test/fuzz/%.c=$(BUILD)/fuzz/fuzz/%.o) $(BUILD)/fuzz/nif/terms.o $(BUILD)/fuzz/nif/link_reader.o test/fuzz
	@rm -f $@
	$(Q)$(AR) rcs $@ $(filter %.o,$^)
$(BUILD)/fuzz/fuzz/%_fuzz: $(BUILD)/fuzz/fuzz/%_fuzz.o $(BUILD)/fuzz/libmeshx_fuzz.a $(BUILD)/fuzz/libmeshx_core.a
	@echo '  CC  $@'
	$(Q)$(CC_fuzz) $(CFLAGS_fuzz) -fsanitize=fuzzer -pthread $(LDFLAGS) -Wl,--start-group $^ -Wl,--end-group -o $@ $(PACKAGE_LIBS)

priv/%: $(BUILD)/release/%
	@mkdir -p $(@D)
	$(Q)install -m 755 $< $@
-include $(wildcard $(BUILD)/*/*/*.d)

# ---- Tests. Without fixed addresses, which kernels with more random bits need for sanitizers.
RUN_C_TEST = MESHX_CONSUL=$$(.ci/consul --path) MESHX_GUARD=$(patsubst %/test,%,$(<D))/meshx_guard \
	$(shell setarch -R true 2>/dev/null && echo setarch -R) $<
test-c-tsan-%: $(BUILD)/tsan/test/%_test $(BUILD)/tsan/meshx_guard
	@$(RUN_C_TEST)
test-c-%: $(BUILD)/asan/test/%_test $(BUILD)/asan/meshx_guard ## one C module's tests under ASan+UBSan (test-c-tsan-%: TSan)
	@$(RUN_C_TEST)
fuzz-%: $(BUILD)/fuzz/fuzz/%_fuzz ## one fuzz target for SECONDS (5); all of its corpus first
	@.ci/fuzz $< $(or $(SECONDS),5)
fuzz: deps ## all fuzz targets in turn, SECONDS each (30), to the first that fails
	@for target in $(FUZZ); do $(MAKE) fuzz-$$target SECONDS=$(or $(SECONDS),30) || exit 1; done
ct: all consul ## the Common Test suites; SUITE=name for one of test/ct/<name>_SUITE.erl, "name name" for some
	@MESHX_CONSUL=$$(.ci/consul --path) MIX_REBAR3=$$(command -v $(REBAR3)) \
		$(REBAR) ct $(if $(SUITE),--suite $$(printf 'test/ct/%s_SUITE\n' $(SUITE) | paste -sd,))
test-otp: deps consul ## build and ct in another release of Debian, SUITE=trixie or sid, and nodes of both; CT=name for one suite, "name name" for some
	@.ci/test-otp $(or $(SUITE),trixie) $(CT)
test-otp-sid: deps consul ## what make test does of it
	@.ci/test-otp sid meshx_node_cluster meshx_node_link meshx_node_framing meshx_node_start_stop
# Not with SUITE's default of all: a sanitizer has nothing to say of most of them.
ct-asan: all consul $(BUILD)/asan/meshx_node.so $(BUILD)/asan/meshx_guard ## the suites of the data path in VMs with the NIF under ASan+UBSan; SUITE=name for one
	@MESHX_CONSUL=$$(.ci/consul --path) .ci/ct-asan $(BUILD)/asan \
		$(or $(SUITE),meshx_node_socket meshx_node_framing meshx_node_stress meshx_node_link meshx_node_load)

LINT := lint-gcc lint-clang lint-format lint-tidy lint-cppcheck lint-xref lint-dialyzer lint-layers lint-sizes
STEPS := $(LINT) $(C_TESTS:%=test-c-%) $(TSAN_TESTS:%=test-c-tsan-%) $(FUZZ:%=fuzz-%) --beside ct test-otp-sid
test: deps consul ## everything: lint, C tests under the sanitizers, fuzzing, Common Test; ends with the sum
	@.ci/test $(STEPS)
steps:
	@echo $(STEPS)

# ---- Lint. Tests are held to the compilers' warnings and the format.
LINT_CFLAGS = $(OWN_CFLAGS) -Werror $(PACKAGE_CFLAGS) $(ERL_CFLAGS) -Itest/c -Ic_src/nif
EACH := xargs -P 2 -n 1
lint: ## every lint-* and check-* step; ends with the sum
	@.ci/test $(LINT)
lint-gcc:
	@printf '%s\n' $(filter %.c,$(C_FILES)) | $(EACH) gcc $(CFLAGS_release) $(LINT_CFLAGS) -o /dev/null -c
lint-clang:
	@printf '%s\n' $(filter %.c,$(C_FILES)) | $(EACH) clang $(LINT_CFLAGS) -fsyntax-only
lint-format:
	@clang-format --dry-run -Werror $(C_FILES)
lint-tidy:
	@printf '%s\n' $(C_SOURCES) | xargs -P 2 -I {} sh -c 'clang-tidy --config-file=.ci/clang-tidy --quiet {} -- $(LINT_CFLAGS) 2>/dev/null'
lint-cppcheck:
	@cppcheck --quiet --std=c11 --enable=warning,performance,portability --inline-suppr \
		--error-exitcode=1 --suppress=missingIncludeSystem -j 2 \
		-D_GNU_SOURCE -Iinclude -Ic_src/core -Ic_src/guard $(C_SOURCES)
lint-xref:
	@$(REBAR) as lint do compile, xref
lint-dialyzer:
	@$(REBAR) as lint dialyzer
lint-layers check-layers: ## who includes whom in c_src
	@.ci/check-layers
lint-sizes:
	@.ci/check-sizes

# ---- The rest
deps: ## install with apt what is missing
	@.ci/deps
consul: ## provide a Consul binary: the one on PATH, or Debian's below _build; prints its path
	@.ci/consul
# A make of its own: what deps has installed is found only by a new one.
demo: deps consul ## build, start an agent and two nodes, and show what they can do
	@$(MAKE) all
	@MESHX_CONSUL=$$(.ci/consul --path) test/demo/run
bench: deps consul ## measure it beside OTP's own carriers (test/bench/run says how to choose what)
	@.ci/deps iproute2
	@$(MAKE) all
	@MESHX_CONSUL=$$(.ci/consul --path) test/bench/run
bench-chart: ## draw the README's pictures, test/bench/*.svg, from the last make bench
	@.ci/deps gnuplot-nox
	@test/bench/chart

# MINUTES, SEED and FAULTS reach it by the environment.
chaos: deps consul ## faults for MINUTES=10 and many cycles; GROUPS="cycles faults soak", SEED=n, FAULTS="..." (test/chaos/run)
	@$(MAKE) all
	@MESHX_CONSUL=$$(.ci/consul --path) test/chaos/run $(GROUPS)

otp-suites: deps consul ## OTP's own suites of what crosses nodes, with inet_tcp and with us; SUITE="rpc pg" for some (test/otp_suites/run)
	@.ci/deps erlang-os-mon
	@$(MAKE) all
	@MESHX_CONSUL=$$(.ci/consul --path) test/otp_suites/run $(SUITE)

clean: clean-native ## remove what was built; keeps _build/consul, _build/debian and dialyzer's _build/plt
	@find _build -mindepth 1 -maxdepth 1 ! -name consul ! -name debian ! -name plt -exec rm -rf {} +
clean-native:
	@rm -rf $(BUILD) priv/meshx_node.so priv/meshx_guard
help:
	@sed -nE 's/^([a-z%-]+)[^#]*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

.PHONY: all native test steps fuzz ct-asan lint $(LINT) check-layers ct test-otp test-otp-sid deps consul demo bench bench-chart chaos otp-suites clean clean-native help
