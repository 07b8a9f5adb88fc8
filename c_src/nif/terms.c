/*
 * Erlang terms: see terms.h.
 */
#include "terms.h"
#include <erl_driver.h> /* erl_errno_id(): the names that inet and file use */
#include <string.h>

#define TERMS_DEFINE(name) ERL_NIF_TERM am_##name;
TERMS_ATOMS(TERMS_DEFINE)
#undef TERMS_DEFINE

void terms_init(ErlNifEnv *env) {
#define TERMS_MAKE(name) am_##name = enif_make_atom(env, #name);
    TERMS_ATOMS(TERMS_MAKE)
#undef TERMS_MAKE
}

ERL_NIF_TERM terms_errno(ErlNifEnv *env, int error_number) {
    return enif_make_atom(env, erl_errno_id(error_number));
}

ERL_NIF_TERM terms_error_errno(ErlNifEnv *env, int error_number) {
    return enif_make_tuple2(env, am_error, terms_errno(env, error_number));
}

ERL_NIF_TERM terms_text(ErlNifEnv *env, const char *text) {
    ERL_NIF_TERM term;
    size_t size;
    unsigned char *bytes;

    if (text == NULL) {
        return am_undefined;
    }
    size = strlen(text);
    bytes = enif_make_new_binary(env, size, &term);
    memcpy(bytes, text, size);
    return term;
}

ERL_NIF_TERM terms_error_closed(ErlNifEnv *env) {
    return enif_make_tuple2(env, am_error, am_closed);
}

ERL_NIF_TERM terms_failure(ErlNifEnv *env, const struct meshx_failure *failure) {
    if (failure == NULL) {
        return am_undefined;
    }
    return enif_make_tuple2(env, enif_make_atom(env, meshx_error_name(failure->code)),
                            terms_text(env, failure->text));
}

char *terms_to_text(ErlNifEnv *env, ERL_NIF_TERM term) {
    ErlNifBinary binary;
    char *text;

    if (!enif_inspect_binary(env, term, &binary) ||
        (binary.size > 0 && memchr(binary.data, '\0', binary.size) != NULL)) {
        return NULL;
    }
    text = enif_alloc(binary.size + 1);
    if (text == NULL) {
        return NULL;
    }
    if (binary.size > 0) {
        memcpy(text, binary.data, binary.size);
    }
    text[binary.size] = '\0';
    return text;
}
