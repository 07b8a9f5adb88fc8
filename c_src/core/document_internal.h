/*
 * What document.c (out) and document_answer.c (in) share. L1, any thread.
 */
#ifndef MESHX_CORE_DOCUMENT_INTERNAL_H
#define MESHX_CORE_DOCUMENT_INTERNAL_H

#include "document.h"
#include <jansson.h>

int document_out_of_memory(struct meshx_failure *failure);

/*
 * Whether jansson ran out of memory while it parsed. It doesn't always say so: mostly it
 * returns without having filled |error|, and a few times it blames the text instead.
 */
bool document_ran_out_of_memory(const json_error_t *error);

/* "an object", for people. */
const char *document_kind_of(const json_t *value);

#endif
