/* See runloop.h for what this is and for the packed exit; here is how a KVM_RUN is entered, answered and recorded. Sessions and signals are
 * session.c's. */
#define _GNU_SOURCE
#include "runloop.h"
#include "turn.h"

#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>

/* For the parts of the loop, which is made twice: left to itself the compiler calls them then, some fifty instructions an exit. */
#define ALWAYS_INLINE inline __attribute__((always_inline))

uint64_t pykvm_rdtsc(void)
{
	return __builtin_ia32_rdtsc();
}

static ALWAYS_INLINE int holds(const struct pykvm_range *range, uint64_t at, uint32_t size)
{
	return at - range->base < range->length && range->length - (at - range->base) >= size;
}

/* The range that holds all of [at, at + size), or NULL. */
static const struct pykvm_range *search(const struct pykvm_range *ranges, uint32_t count, uint64_t at, uint32_t size)
{
	uint32_t low = 0, high = count, middle;

	while (low < high) {
		middle = (low + high) / 2;
		if (at < ranges[middle].base)
			high = middle;
		else if (at - ranges[middle].base >= ranges[middle].length)
			low = middle + 1;
		else
			return holds(&ranges[middle], at, size) ? &ranges[middle] : NULL;
	}
	return NULL;
}

static inline uint64_t load(const uint8_t *from, uint32_t size)
{
	uint64_t value = 0;

	/* A size known at compile time is one instruction, an unknown one a call. */
	switch (size) {
	case 1:
		memcpy(&value, from, 1);
		break;
	case 2:
		memcpy(&value, from, 2);
		break;
	case 4:
		memcpy(&value, from, 4);
		break;
	default:
		memcpy(&value, from, size);
	}
	return value;
}

static inline void store(uint8_t *to, uint64_t value, uint32_t size)
{
	switch (size) {
	case 1:
		memcpy(to, &value, 1);
		break;
	case 2:
		memcpy(to, &value, 2);
		break;
	case 4:
		memcpy(to, &value, 4);
		break;
	default:
		memcpy(to, &value, size);
	}
}

/* One access, as struct kvm_run tells it. */
struct access {
	uint64_t at, value;
	uint8_t *data;
	uint32_t size, count, is_write, is_mmio;
};

/* Is this exit a PIO or MMIO access whose fields make sense? data stays inside the mapping. */
static ALWAYS_INLINE int read_access(const struct pykvm_vcpu *v, struct access *a)
{
	struct kvm_run *run = v->run;
	uint64_t offset;

	if (run->exit_reason == KVM_EXIT_IO) {
		a->at = run->io.port;
		a->size = run->io.size;
		a->count = run->io.count;
		a->is_write = run->io.direction == KVM_EXIT_IO_OUT;
		a->is_mmio = 0;
		offset = run->io.data_offset;
		if (!a->count || offset >= v->run_size || a->size > 8 || (uint64_t)a->size * a->count > v->run_size - offset)
			return 0;
		a->data = (uint8_t *)run + offset;
	} else if (run->exit_reason == KVM_EXIT_MMIO) {
		a->at = run->mmio.phys_addr;
		a->size = run->mmio.len;
		a->count = 1;
		a->is_write = run->mmio.is_write;
		a->is_mmio = 1;
		if (a->size > 8)
			return 0;
		a->data = run->mmio.data;
	} else {
		return 0;
	}
	a->value = a->is_write ? load(a->data, a->size) : 0;
	return 1;
}

/* The qualifier of an exit that is no access: the one number that tells two exits of this reason apart. */
static uint64_t qualifier(const struct kvm_run *run)
{
	switch (run->exit_reason) {
	case KVM_EXIT_X86_RDMSR:
	case KVM_EXIT_X86_WRMSR:
		return run->msr.index;
	case KVM_EXIT_HYPERCALL:
		return run->hypercall.nr;
	case KVM_EXIT_INTERNAL_ERROR:
		return run->internal.suberror;
	case KVM_EXIT_FAIL_ENTRY:
		return run->fail_entry.hardware_entry_failure_reason;
	case KVM_EXIT_DEBUG:
		return run->debug.arch.exception;
	case KVM_EXIT_SYSTEM_EVENT:
		return run->system_event.type;
	case KVM_EXIT_IOAPIC_EOI:
		return run->eoi.vector;
	case KVM_EXIT_UNKNOWN:
		return run->hw.hardware_exit_reason;
	default:
		return 0;
	}
}

/* A record of the exit at hand, but for what its reason calls for. NULL, and counted, when there is no room. */
static inline struct pykvm_record *new_record(const struct pykvm_vcpu *v, struct pykvm_ring *ring, uint64_t before, uint64_t after)
{
	const struct kvm_run *run = v->run;
	struct pykvm_record *r;

	if (ring->used == ring->capacity) {
		ring->open = NULL;
		ring->lost++;
		return NULL;
	}
	r = &ring->data[ring->used];
	r->tsc_before = before;
	r->tsc_after = after;
	r->tsc_handled = 0;
	r->rip = run->kvm_valid_regs & KVM_SYNC_X86_REGS ? run->s.regs.regs.rip : 0;
	r->reason = run->exit_reason;
	r->count = 1;
	r->vcpu = (uint16_t)v->id;
	r->reserved = 0;
	ring->open = r;
	__atomic_store_n(&ring->used, ring->used + 1, __ATOMIC_RELAXED);
	return r;
}

static void record(const struct pykvm_vcpu *v, struct pykvm_ring *ring, const struct access *a, uint64_t before, uint64_t after)
{
	struct pykvm_record *r = new_record(v, ring, before, after);

	if (!r)
		return;
	r->qualifier = a ? a->at : qualifier(v->run);
	r->value = a ? a->value : 0;
	r->size = a ? (uint8_t)a->size : 0;
	r->is_write = a ? (uint8_t)a->is_write : 0;
	r->count = a ? a->count : 1;
}

/* The same for an access that act_quickly() has carried out: its data are there, of reads too. */
static inline void record_quick(const struct pykvm_vcpu *v, struct pykvm_ring *ring, uint64_t before, uint64_t after)
{
	struct pykvm_record *r = new_record(v, ring, before, after);
	struct kvm_run *run = v->run;

	if (!r)
		return;
	if (run->exit_reason == KVM_EXIT_IO) {
		r->qualifier = run->io.port;
		r->size = run->io.size;
		r->is_write = run->io.direction == KVM_EXIT_IO_OUT;
		r->value = run->io.size <= 8 && run->io.data_offset <= v->run_size - 8
				   ? load((uint8_t *)run + run->io.data_offset, run->io.size) : 0;
	} else {
		r->qualifier = run->mmio.phys_addr;
		r->size = (uint8_t)run->mmio.len;
		r->is_write = run->mmio.is_write;
		r->value = load(run->mmio.data, run->mmio.len);
	}
}

static inline void close_record(struct pykvm_ring *ring, uint64_t now)
{
	if (ring->open && !ring->open->tsc_handled)
		ring->open->tsc_handled = now;
}

/* Close the last exit's record: its answer is there. */
void pykvm_handled(struct pykvm_vcpu *v)
{
	if (v->ring)
		close_record(v->ring, pykvm_rdtsc());
}

static void answer(struct pykvm_vcpu *v, uint64_t reply)
{
	store(v->reply_at, reply, v->reply_size);
	if (v->ring && v->ring->open)
		v->ring->open->value = load(v->reply_at, v->reply_size);
	v->reply_size = 0;
}

/* Carry out a range's action. Returns 0 when Python must see the access. */
static ALWAYS_INLINE int act(struct pykvm_vcpu *v, const struct pykvm_range *range, const struct access *a)
{
	struct pykvm_sink *sink = range->sink;

	if (a->count != 1)
		return 0;
	switch (range->action) {
	case PYKVM_CONSTANT:
		if (!a->is_write && (a->size & (a->size - 1)))
			return 0;	/* an odd piece, cut off at a page end: the bus reads it in parts */
		if (!a->is_write)
			answer(v, range->value);
		return 1;
	case PYKVM_APPEND:
		if (!a->is_write || sink->capacity - sink->used < a->size)
			return 0;
		memcpy(sink->data + sink->used, a->data, a->size);
		sink->used += a->size;
		v->appended = 1;
		return 1;
	default:
		return 0;
	}
}

static inline uint64_t pack(int kind, uint64_t high)
{
	return (uint64_t)kind | high << 32;
}

/* EINTR: whatever asked for it is served. Under the lock, so that a kick is seen here or interrupts what comes next. */
static uint64_t interrupted(struct pykvm_vcpu *v)
{
	pthread_mutex_lock(&v->lock);
	v->run->immediate_exit = 0;
	v->was_kicked = v->kicked;
	v->was_ticked = v->ticked;
	v->kicked = v->ticked = 0;
	pthread_mutex_unlock(&v->lock);
	return pack(PYKVM_ERROR, EINTR);
}

/* The word for an access to a range, or LOOK when it has no room: a far offset, an odd size, a REP. */
static ALWAYS_INLINE uint64_t pack_access(const struct pykvm_range *range, const struct access *a)
{
	uint64_t offset = a->at - range->base;
	int kind = (a->is_mmio ? PYKVM_MMIO_WRITE : PYKVM_OUT) + !a->is_write;

	if (a->count != 1 || offset > 0xffff || !a->size || (a->size & (a->size - 1)))
		return pack(PYKVM_LOOK, a->is_mmio ? KVM_EXIT_MMIO : KVM_EXIT_IO);
	return (uint64_t)kind | (uint64_t)__builtin_ctz(a->size) << 4 | (uint64_t)range->index << 6 | offset << 16;
}

/* Guests stay with a device for a while: the range of the last access is tried first. */
static ALWAYS_INLINE const struct pykvm_range *find(struct pykvm_vcpu *v, const struct access *a)
{
	const struct pykvm_range *range = v->recent[a->is_mmio];

	if (range && holds(range, a->at, a->size))
		return range;
	range = a->is_mmio ? search(v->table->mmio, v->table->mmio_count, a->at, a->size)
			   : search(v->table->pio, v->table->pio_count, a->at, a->size);
	if (range)
		v->recent[a->is_mmio] = range;
	return range;
}

/* The native loop's most frequent case in a third of the instructions: the range of the last access once more, whose writes vanish and
 * whose reads give a constant. Returns 0 when the long way has to be gone. */
static ALWAYS_INLINE int act_quickly(const struct pykvm_vcpu *v, struct kvm_run *run)
{
	const struct pykvm_range *range = v->recent[run->exit_reason == KVM_EXIT_MMIO];

	if (!range || range->action != PYKVM_CONSTANT)
		return 0;
	if (run->exit_reason == KVM_EXIT_IO) {
		if (run->io.count != 1 || !holds(range, run->io.port, run->io.size))
			return 0;
		if (run->io.direction == KVM_EXIT_IO_IN) {
			if (run->io.size > 8 || run->io.data_offset > v->run_size - 8)
				return 0;
			store((uint8_t *)run + run->io.data_offset, range->value, run->io.size);
		}
		return 1;
	}
	if (run->exit_reason != KVM_EXIT_MMIO || run->mmio.len > 8 || !holds(range, run->mmio.phys_addr, run->mmio.len))
		return 0;
	if (!run->mmio.is_write) {
		if (run->mmio.len & (run->mmio.len - 1))
			return 0;
		store(run->mmio.data, range->value, run->mmio.len);
	}
	return 1;
}

/* What tells one access from another, word by word as struct kvm_run has it; without the data. */
static ALWAYS_INLINE struct pykvm_again what(const struct kvm_run *run)
{
	struct pykvm_again w = { .reason = run->exit_reason };

	if (run->exit_reason == KVM_EXIT_IO) {
		memcpy(&w.first, &run->io, 8);	/* direction, size, port, count */
		w.second = run->io.data_offset;
	} else {
		w.first = run->mmio.phys_addr;
		w.second = run->mmio.len | (uint64_t)run->mmio.is_write << 32;
	}
	return w;
}

/* The Python loop's most frequent case: the last access to a device once more. Returns 0 when the long way has to be gone. */
static ALWAYS_INLINE uint64_t again(struct pykvm_vcpu *v, struct kvm_run *run)
{
	const struct pykvm_again *w = &v->again, now = what(run);
	uint8_t *data;

	if (now.reason != w->reason || now.first != w->first || now.second != w->second)
		return 0;
	data = now.reason == KVM_EXIT_IO ? (uint8_t *)run + now.second : run->mmio.data;
	if (w->is_write) {
		v->value = load(data, w->size);
	} else {
		v->reply_at = data;
		v->reply_size = w->size;
	}
	return w->name;
}

/* Where the time of an exit's answer ends and that of the next KVM_RUN begins: one reading of the clock is both. The page fault that
 * the first record in a page costs comes between them, and is in nobody's time. So does what a trace
 * keeps of the last exit. Returns that reading, 0 when the ring is full, or when Python has to look at that exit now. */
static inline uint64_t next_record(const struct pykvm_vcpu *v, struct pykvm_ring *ring)
{
	uint64_t now = pykvm_rdtsc();

	close_record(ring, now);
	if (ring->moments) {
		if (!pykvm_keep_moment(v, ring))
			return 0;
		now = pykvm_rdtsc();
	}
	if (ring->used == ring->capacity)
		return ring->keep ? now : 0;
	if (ring->used % PYKVM_RECORDS_IN_A_PAGE == 0) {
		*(volatile uint64_t *)&ring->data[ring->used].tsc_handled = 0;
		now = pykvm_rdtsc();
	}
	return now;
}

/* The loop itself, made twice: with a ring, and without one (NULL), where none of the instructions for it are. */
static ALWAYS_INLINE uint64_t run_recording(struct pykvm_vcpu *v, struct pykvm_ring *ring)
{
	const int may_be_quick = v->native && v->table;
	struct kvm_run *run = v->run;
	const struct pykvm_range *range;
	uint64_t before = 0, after = 0;
	struct access a;
	uint64_t packed;
	int is_access;

	for (;;) {
		if (ring) {
			before = next_record(v, ring);
			if (!before)
				return PYKVM_DRAIN;
		}
		if (ioctl(v->fd, KVM_RUN, 0)) {
			if (errno == EINTR)
				return interrupted(v);
			return pack(PYKVM_ERROR, (uint32_t)errno);
		}
		if (ring)
			after = pykvm_rdtsc();
		v->counts[run->exit_reason < PYKVM_REASONS ? run->exit_reason : PYKVM_REASONS - 1]++;
		if (may_be_quick && act_quickly(v, run)) {
			if (ring)
				record_quick(v, ring, before, after);
			continue;
		}
		if (!ring && (packed = again(v, run)))
			return packed;
		is_access = read_access(v, &a);
		if (ring)
			record(v, ring, is_access ? &a : NULL, before, after);
		if (!is_access)
			return pack(PYKVM_LOOK, run->exit_reason);
		if (!a.is_write) {
			v->reply_at = a.data;	/* of a REP, the first element */
			v->reply_size = a.size;
		}
		if (!v->table)
			return pack(PYKVM_LOOK, run->exit_reason);
		range = find(v, &a);
		if (!range)
			return pack(PYKVM_LOOK, run->exit_reason);
		if (!v->native || !act(v, range, &a)) {
			packed = pack_access(range, &a);
			v->value = a.value;
			if (!ring && (packed & 15) != PYKVM_LOOK && (!v->native || range->action == PYKVM_TO_PYTHON)) {
				v->again = what(run);
				v->again.name = (uint32_t)packed;
				v->again.size = a.size;
				v->again.is_write = a.is_write;
			}
			return packed;
		}
	}
}

static uint64_t step(struct pykvm_vcpu *v)
{
	return v->ring ? run_recording(v, v->ring) : run_recording(v, NULL);
}

static inline struct pykvm_hot *place(struct pykvm_vcpu *v, uint32_t key)
{
	return &v->hot[key * 0x9e3779b1u >> 26];	/* 26 = 32 - log2(PYKVM_HOT) */
}

/* From now on, step() names this access by its slot. A displaced one is looked at again. */
void pykvm_remember(struct pykvm_vcpu *v, uint32_t key, uint32_t slot)
{
	struct pykvm_hot *h = place(v, key);

	h->key = key;
	h->slot = slot & 0xff;
}

/* An access as an exit for Python to decode: the index in it means nothing in another table. */
static uint64_t without_index(const struct pykvm_vcpu *v, uint64_t packed)
{
	uint32_t kind = packed & 15;

	return kind >= PYKVM_OUT && kind <= PYKVM_MMIO_READ && v->run ? pack(PYKVM_LOOK, v->run->exit_reason) : packed;
}

/* The table has changed. */
void pykvm_forget(struct pykvm_vcpu *v)
{
	v->last = without_index(v, v->last);
	v->stash = without_index(v, v->stash);
	memset(v->hot, 0, sizeof(v->hot));
	memset(v->recent, 0, sizeof(v->recent));
	v->again.reason = 0;
}

/* Run until Python must see something: a slot, and its devices' lock with it, or 0 with the whole story in last. */
static inline uint32_t run_on(struct pykvm_vcpu *v)
{
	const struct pykvm_hot *h;

	pykvm_leave_devices(v);
	if (v->stashed) {
		v->stashed = 0;
		v->last = v->stash;
		return 0;
	}
	v->reply_size = 0;
	pykvm_give_turn(v->tid);
	v->last = v->kicked & PYKVM_KICKED_ITSELF ? interrupted(v) : step(v);
	pykvm_take_turn(v->tid);
	if (v->appended || (v->coalesced && v->coalesced->first != v->coalesced->last)) {
		/* What the guest wrote before comes first: Python empties sinks and ring, then asks again. */
		v->appended = 0;
		if (v->last != PYKVM_DRAIN) {
			v->stash = v->last;
			v->stashed = 1;
			v->last = PYKVM_DRAIN;
		}
	}
	h = place(v, (uint32_t)v->last);
	if (h->key != (uint32_t)v->last)
		return 0;
	if (v->devices) {
		if (!pykvm_try_lock(v->devices, v->thread))
			return 0;
		v->held = v->devices;
	}
	return h->slot;
}

/* Answer the last exit, if it is one that waits for a reply. */
void pykvm_answer(struct pykvm_vcpu *v, uint64_t reply)
{
	if (v->reply_size && !v->stashed && v->run)
		answer(v, reply);
}

/* These two run the vCPU of this thread's session: each argument that Python need not hand over saves some hundred instructions an
 * exit. A child that was forked amid a session has none. */
uint32_t pykvm_run(void)
{
	struct pykvm_vcpu *v = pykvm_current;

	return v ? run_on(v) : PYKVM_NO_SESSION;
}

/* The same, after answering the previous exit with reply. */
uint32_t pykvm_step(uint64_t reply)
{
	struct pykvm_vcpu *v = pykvm_current;

	if (!v)
		return PYKVM_NO_SESSION;
	if (v->reply_size && !v->stashed) {
		if (v->reply_size < 8 && reply >> 8 * v->reply_size)
			return PYKVM_BAD_REPLY;
		answer(v, reply);
	}
	return run_on(v);
}

/* One exit of whatever kind, in a session. No actions are carried out, and an exit is not recorded when the ring is full: here is nobody to
 * empty it. */
void pykvm_once(struct pykvm_vcpu *v)
{
	struct pykvm_table *table = v->table;
	struct pykvm_ring *ring = v->ring;

	v->table = NULL;
	if (ring && ((ring->used == ring->capacity && !ring->keep) || (ring->moments && !pykvm_keep_moment(v, ring))))
		v->ring = NULL;
	if (v->stashed) {
		v->stashed = 0;
		v->last = v->stash;
	} else {
		v->reply_size = 0;
		v->last = step(v);
	}
	v->table = table;
	v->ring = ring;
}

/* begin, one exit, end, in one call: a Python signal handler that raises cannot come between. Returns what begin does. */
int pykvm_run_once(struct pykvm_vcpu *v, uint64_t first_ns, uint64_t interval_ns)
{
	int r = pykvm_begin(v, first_ns, interval_ns);

	if (r < 0)
		return r;
	pykvm_once(v);
	pykvm_end(v);
	return 0;
}
