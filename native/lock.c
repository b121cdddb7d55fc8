/* The lock of devices for who is in Python. See lock.h and DeviceLock in pykvm/smp.py. */
#include "lock.h"
#include "runloop.h"

#include <time.h>

#define FIRST_NS 20000	/* a few handlers */
#define LAST_NS 2000000

/* How many times this thread has it. */
uint32_t pykvm_lock_depth(const struct pykvm_lock *l)
{
	return __atomic_load_n(&l->owner, __ATOMIC_RELAXED) == pykvm_this_thread() ? l->depth : 0;
}

/* Whether this thread has it now, after some milliseconds at most: Python's signal handlers run between two calls. */
int pykvm_lock(struct pykvm_lock *l)
{
	struct timespec pause = { .tv_nsec = FIRST_NS };

	while (!pykvm_try_lock(l, pykvm_this_thread())) {
		if (pause.tv_nsec > LAST_NS)
			return 0;
		nanosleep(&pause, NULL);
		pause.tv_nsec *= 2;
	}
	return 1;
}

/* This thread has it only so many times now. Does nothing in a thread that does not have it: whoever was interrupted on the way to take it
 * may call it all the same. */
void pykvm_unlock_to(struct pykvm_lock *l, uint32_t depth)
{
	if (pykvm_lock_depth(l) > depth)
		pykvm_back_to(l, depth);
}
