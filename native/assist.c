/* Accesses to guest memory that must be one atomic access, done for a guest by pykvm/x86/assist. */
#include <stdint.h>

#include "assist.h"

void pykvm_or8(uint8_t *at, uint8_t bits)
{
	__atomic_fetch_or(at, bits, __ATOMIC_SEQ_CST);
}

/* LOCK CMPXCHG16B at a 16-byte aligned place: value[0..1] is expected, and becomes what was there. */
int pykvm_cmpxchg16(void *at, uint64_t value[2], uint64_t low, uint64_t high)
{
	uint8_t equal;

	__asm__ volatile("lock cmpxchg16b %1\n\tsete %0"
			 : "=q"(equal), "+m"(*(unsigned __int128 *)at), "+a"(value[0]), "+d"(value[1])
			 : "b"(low), "c"(high)
			 : "memory", "cc");
	return equal;
}
