/* The lock of devices that several vCPUs share: who has it is asking one of them. The same thread may take it again.
 *
 * pykvm_step() takes it before it comes back to Python with an access to a device, and gives it back when it is called again: a lock of
 * Python's around each device method would cost more instructions than the rest of an exit. There nobody waits: when another thread has
 * it, the access goes the long way through Python, which waits where signals are seen. */
#ifndef PYKVM_LOCK_H
#define PYKVM_LOCK_H

#include <stdint.h>

struct pykvm_lock {
	uint64_t owner;		/* the serial number of a thread, 0: nobody */
	uint32_t depth;		/* how many times it has taken it; the owner's alone */
	uint32_t reserved;
};

static inline int pykvm_try_lock(struct pykvm_lock *l, uint64_t thread)
{
	uint64_t nobody = 0;

	if (__atomic_load_n(&l->owner, __ATOMIC_RELAXED) != thread
	    && !__atomic_compare_exchange_n(&l->owner, &nobody, thread, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
		return 0;
	l->depth++;
	return 1;
}

static inline void pykvm_back_to(struct pykvm_lock *l, uint32_t depth)
{
	l->depth = depth;
	if (!depth)
		__atomic_store_n(&l->owner, 0, __ATOMIC_RELEASE);
}

uint32_t pykvm_lock_depth(const struct pykvm_lock *l);
int pykvm_lock(struct pykvm_lock *l);
void pykvm_unlock_to(struct pykvm_lock *l, uint32_t depth);

#endif
