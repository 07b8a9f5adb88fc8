/*
 * As much of the emulator's NIF interface as c_src/nif's two link_ files use, so that
 * each runs in a fuzz target. Stricter than the emulator: memory of an environment is
 * gone as soon as it is cleared, and binaries are as long as was asked for, so
 * AddressSanitizer sees what the emulator would let pass.
 */
#ifndef MESHX_TEST_EMULATOR_H
#define MESHX_TEST_EMULATOR_H

#include "socket.h"

/* The environment of one call of a NIF; frees all that was made in it. */
ErlNifEnv *emulator_begin(void);
void emulator_end(ErlNifEnv *env);

/* From now on the |nth| (1 = next) allocation that the emulator itself survives fails. 0:
 * none. */
void emulator_fail(size_t nth);

/* How often readiness was asked for since the last time this was. */
struct emulator_selected {
    unsigned input;
    unsigned output;
};
struct emulator_selected emulator_selected(void);

/* Whether a call was wrong, {error, _} or an atom of this name. */
bool emulator_is_badarg(ERL_NIF_TERM term);
bool emulator_is_error(ERL_NIF_TERM term);
bool emulator_is(ERL_NIF_TERM term, const char *atom);

/* A handshake's link with locks as they should be; its descriptor is of no use. */
void emulator_open(struct socket *socket);

/* Frees what a link holds. */
void emulator_close(struct socket *socket);

/* The one link there is, for socket_get(). */
extern ERL_NIF_TERM emulator_link;

#endif
