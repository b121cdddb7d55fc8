/* Whose turn it is to be in Python, among the threads of this process that run vCPUs.
 *
 * A thread that comes out of KVM_RUN needs the GIL. When another one has it, CPython puts the thread to sleep, and the one that goes back
 * to its guest has to wake it: some ten microseconds of system calls and scheduling for a handler of half a microsecond, and the longer it
 * takes the likelier are the next two to collide. Here the thread waits awake instead, for as long as a few handlers take, and asks for the
 * GIL when it is likely to be free. The turn is a hint and guards nothing: who has waited too long (a device that sleeps, a child forked
 * amid a turn) takes it and goes on. */
#ifndef PYKVM_TURN_H
#define PYKVM_TURN_H

#include <stdint.h>

#define PYKVM_TURN_WAIT (1u << 16)	/* TSC units, some 20 microseconds */

/* The thread whose turn it is, 0 for none; in a cache line of its own. */
extern struct pykvm_turn {
	int32_t tid;
} pykvm_turn __attribute__((aligned(64), visibility("hidden")));

static inline void pykvm_give_turn(int32_t tid)
{
	if (pykvm_turn.tid == tid)
		__atomic_store_n(&pykvm_turn.tid, 0, __ATOMIC_RELEASE);
}

static inline void pykvm_take_turn(int32_t tid)
{
	uint64_t since = 0;
	int32_t nobody;

	for (;;) {
		nobody = 0;
		if (!__atomic_load_n(&pykvm_turn.tid, __ATOMIC_RELAXED)
		    && __atomic_compare_exchange_n(&pykvm_turn.tid, &nobody, tid, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
			return;
		if (!since)
			since = __builtin_ia32_rdtsc();
		if (__builtin_ia32_rdtsc() - since > PYKVM_TURN_WAIT)
			break;
		__builtin_ia32_pause();
	}
	__atomic_store_n(&pykvm_turn.tid, tid, __ATOMIC_RELAXED);
}

#endif
