/* As much of the emulator's NIF interface as the data path uses; see emulator.h. */
#include "emulator.h"
#include "fuzz.h"
#include "link.h"

#include <erl_driver.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum kind { ATOM, INTEGER, BINARY, TUPLE, CELL, NIL, BADARG };

struct term {
    enum kind kind;
    struct term *next; /* in its environment */
    uint64_t number;
    size_t size; /* of |bytes|, or elements */
    unsigned char *bytes;
    ERL_NIF_TERM *elements; /* of a tuple; head and tail */
};

struct enif_environment_t {
    struct term *terms;
};

/* Locks are only counted: there is one thread. */
struct ErlDrvMutex_ {
    bool locked;
};

static struct enif_environment_t atoms;
static struct socket *opened;
static struct emulator_selected selected;
static size_t countdown;
ERL_NIF_TERM emulator_link;

static struct term *get(ERL_NIF_TERM term) {
    return (struct term *)(uintptr_t)term;
}

static struct term *make(ErlNifEnv *env, enum kind kind) {
    struct term *term = calloc(1, sizeof *term);
    CHECK(term != NULL);
    term->kind = kind;
    term->next = env->terms;
    env->terms = term;
    return term;
}

static ERL_NIF_TERM term_of(const struct term *term) {
    return (ERL_NIF_TERM)(uintptr_t)term;
}

static bool refuse(void) {
    return countdown > 0 && --countdown == 0;
}

void emulator_fail(size_t nth) {
    countdown = nth;
}

struct emulator_selected emulator_selected(void) {
    struct emulator_selected result = selected;
    selected = (struct emulator_selected){0};
    return result;
}

ErlNifEnv *emulator_begin(void) {
    ErlNifEnv *env = calloc(1, sizeof *env);
    CHECK(env != NULL);
    return env;
}

void emulator_end(ErlNifEnv *env) {
    enif_clear_env(env);
    free(env);
}

bool emulator_is_badarg(ERL_NIF_TERM term) {
    return get(term)->kind == BADARG;
}

bool emulator_is(ERL_NIF_TERM term, const char *atom) {
    return get(term)->kind == ATOM && strcmp((char *)get(term)->bytes, atom) == 0;
}

bool emulator_is_error(ERL_NIF_TERM term) {
    return get(term)->kind == TUPLE && emulator_is(get(term)->elements[0], "error");
}

void emulator_open(struct socket *socket) {
    static struct ErlDrvMutex_ read;
    static struct ErlDrvMutex_ write;
    if (emulator_link == 0) {
        terms_init(&atoms);
        emulator_link = term_of(make(&atoms, NIL));
    }
    memset(socket, 0, sizeof *socket);
    socket->read = &read;
    socket->write = &write;
    socket->header = FRAME_HANDSHAKE;
    opened = socket;
    selected = (struct emulator_selected){0};
}

void emulator_close(struct socket *socket) {
    CHECK(!socket->read->locked && !socket->write->locked);
    link_reader_free(socket);
    if (socket->writer.env != NULL) {
        emulator_end(socket->writer.env);
    }
    opened = NULL;
}

struct socket *socket_get(ErlNifEnv *env, ERL_NIF_TERM term) {
    (void)env;
    return term == emulator_link ? opened : NULL;
}

/* ---- locks and memory ---- */

void enif_mutex_lock(ErlNifMutex *lock) {
    CHECK(!lock->locked);
    lock->locked = true;
}

void enif_mutex_unlock(ErlNifMutex *lock) {
    CHECK(lock->locked);
    lock->locked = false;
}

void *enif_alloc(size_t size) {
    return refuse() ? NULL : malloc(size);
}

void enif_free(void *pointer) {
    free(pointer);
}

ErlNifEnv *enif_alloc_env(void) {
    return refuse() ? NULL : emulator_begin();
}

void enif_clear_env(ErlNifEnv *env) {
    while (env->terms != NULL) {
        struct term *term = env->terms;
        env->terms = term->next;
        free(term->bytes);
        free(term->elements);
        free(term);
    }
}

int enif_alloc_binary(size_t size, ErlNifBinary *binary) {
    unsigned char *data = refuse() ? NULL : malloc(size);
    if (data == NULL) {
        return 0;
    }
    binary->data = data;
    binary->size = size;
    return 1;
}

int enif_realloc_binary(ErlNifBinary *binary, size_t size) {
    unsigned char *data = refuse() ? NULL : realloc(binary->data, size);
    if (data == NULL) {
        return 0;
    }
    binary->data = data;
    binary->size = size;
    return 1;
}

void enif_release_binary(ErlNifBinary *binary) {
    free(binary->data);
    binary->data = NULL;
}

/* ---- terms ---- */

ERL_NIF_TERM enif_make_binary(ErlNifEnv *env, ErlNifBinary *binary) {
    struct term *term = make(env, BINARY);
    term->bytes = binary->data;
    term->size = binary->size;
    binary->data = NULL; /* the term's from now on */
    return term_of(term);
}

unsigned char *enif_make_new_binary(ErlNifEnv *env, size_t size, ERL_NIF_TERM *out) {
    struct term *term = make(env, BINARY);
    term->bytes = malloc(size);
    term->size = size;
    *out = term_of(term);
    return term->bytes;
}

ERL_NIF_TERM enif_make_sub_binary(ErlNifEnv *env, ERL_NIF_TERM whole, size_t offset,
                                  size_t size) {
    struct term *term = make(env, BINARY);
    CHECK(get(whole)->kind == BINARY && offset <= get(whole)->size &&
          size <= get(whole)->size - offset);
    term->bytes = fuzz_block(get(whole)->bytes + offset, size);
    term->size = size;
    return term_of(term);
}

ERL_NIF_TERM enif_make_atom(ErlNifEnv *env, const char *name) {
    (void)env;
    for (const struct term *term = atoms.terms; term != NULL; term = term->next) {
        if (term->kind == ATOM && strcmp((const char *)term->bytes, name) == 0) {
            return term_of(term);
        }
    }
    struct term *term = make(&atoms, ATOM);
    term->bytes = (unsigned char *)strdup(name);
    return term_of(term);
}

ERL_NIF_TERM enif_make_badarg(ErlNifEnv *env) {
    return term_of(make(env, BADARG));
}

/* enif_make_uint64() and enif_get_uint64() where long has 64 bits. */
ERL_NIF_TERM enif_make_ulong(ErlNifEnv *env, unsigned long number) {
    struct term *term = make(env, INTEGER);
    term->number = number;
    return term_of(term);
}

static struct term *make_elements(ErlNifEnv *env, enum kind kind, size_t count) {
    struct term *term = make(env, kind);
    term->elements = calloc(count, sizeof *term->elements);
    CHECK(term->elements != NULL || count == 0);
    term->size = count;
    return term;
}

ERL_NIF_TERM enif_make_tuple(ErlNifEnv *env, unsigned count, ...) {
    struct term *term = make_elements(env, TUPLE, count);
    va_list list;
    va_start(list, count);
    for (size_t i = 0; i < count; i++) {
        term->elements[i] = va_arg(list, ERL_NIF_TERM);
    }
    va_end(list);
    return term_of(term);
}

ERL_NIF_TERM enif_make_list_from_array(ErlNifEnv *env, const ERL_NIF_TERM array[],
                                       unsigned count) {
    ERL_NIF_TERM list = term_of(make(env, NIL));
    while (count-- > 0) {
        struct term *cell = make_elements(env, CELL, 2);
        cell->elements[0] = array[count];
        cell->elements[1] = list;
        list = term_of(cell);
    }
    return list;
}

ERL_NIF_TERM enif_make_list(ErlNifEnv *env, unsigned count, ...) {
    CHECK(count == 0);
    return enif_make_list_from_array(env, NULL, 0);
}

ERL_NIF_TERM enif_make_copy(ErlNifEnv *env, ERL_NIF_TERM from) {
    struct term *source = get(from);
    if (source->kind == ATOM) {
        return from;
    }
    struct term *term = make_elements(env, source->kind, source->size);
    term->number = source->number;
    if (source->kind == BINARY) {
        free(term->elements);
        term->elements = NULL;
        term->bytes = fuzz_block(source->bytes, source->size);
    } else {
        for (size_t i = 0; i < source->size; i++) {
            term->elements[i] = enif_make_copy(env, source->elements[i]);
        }
    }
    return term_of(term);
}

int enif_is_identical(ERL_NIF_TERM a, ERL_NIF_TERM b) {
    return a == b; /* asked for atoms only */
}

int enif_is_list(ErlNifEnv *env, ERL_NIF_TERM term) {
    (void)env;
    return get(term)->kind == CELL || get(term)->kind == NIL;
}

int enif_get_list_cell(ErlNifEnv *env, ERL_NIF_TERM list, ERL_NIF_TERM *head,
                       ERL_NIF_TERM *tail) {
    (void)env;
    if (get(list)->kind != CELL) {
        return 0;
    }
    *head = get(list)->elements[0];
    *tail = get(list)->elements[1];
    return 1;
}

int enif_get_tuple(ErlNifEnv *env, ERL_NIF_TERM tuple, int *arity,
                   const ERL_NIF_TERM **elements) {
    (void)env;
    if (get(tuple)->kind != TUPLE) {
        return 0;
    }
    *arity = (int)get(tuple)->size;
    *elements = get(tuple)->elements;
    return 1;
}

int enif_get_ulong(ErlNifEnv *env, ERL_NIF_TERM term, unsigned long *out) {
    (void)env;
    *out = get(term)->number;
    return get(term)->kind == INTEGER;
}

int enif_get_int(ErlNifEnv *env, ERL_NIF_TERM term, int *out) {
    unsigned long number = 0;
    int is_integer = enif_get_ulong(env, term, &number);
    *out = (int)number;
    return is_integer;
}

int enif_inspect_binary(ErlNifEnv *env, ERL_NIF_TERM term, ErlNifBinary *out) {
    (void)env;
    out->data = get(term)->bytes;
    out->size = get(term)->size;
    return get(term)->kind == BINARY;
}

/* ---- the rest ---- */

int enif_consume_timeslice(ErlNifEnv *env, int percent) {
    (void)env;
    CHECK(percent >= 1 && percent <= 100);
    return percent == 100;
}

int enif_select(ErlNifEnv *env, ErlNifEvent event, enum ErlNifSelectFlags flags,
                void *object, const ErlNifPid *pid, ERL_NIF_TERM reference) {
    (void)env;
    (void)pid;
    (void)reference;
    CHECK(object == opened && event == opened->fd);
    if (refuse()) {
        return -1;
    }
    selected.input += (flags & ERL_NIF_SELECT_READ) != 0;
    selected.output += (flags & ERL_NIF_SELECT_WRITE) != 0;
    return 0;
}

char *erl_errno_id(int error) {
    static char name[] = "errno";
    (void)error;
    return name;
}
