/* Random JSON schemas that grammars should take. */
#ifndef TMF_TESTS_SCHEMA_MAKER_H
#define TMF_TESTS_SCHEMA_MAKER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    char p[20000];
    size_t n;
    uint64_t seed;
    bool defs;
    int any; /* within so many anyOf: a reference there could come back to itself */
} schema_maker;

/* The next schema of m->seed (not 0) into m->p [m->n]: an array of what refers to a definition, or
 * what was made as it is. */
void schema_make(schema_maker *m);

#endif
