/* Atomic accesses to guest memory; see assist.c. */
#ifndef PYKVM_ASSIST_H
#define PYKVM_ASSIST_H

#include <stdint.h>

void pykvm_or8(uint8_t *at, uint8_t bits);
int pykvm_cmpxchg16(void *at, uint64_t value[2], uint64_t low, uint64_t high);

#endif
