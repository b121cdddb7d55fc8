/* See runloop.h for what this is and for the packed exit; here is how a KVM_RUN is entered, interrupted and recorded. */
#define _GNU_SOURCE
#include "runloop.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

/* For the parts of the loop, which is made twice: left to itself the compiler calls them then, some fifty instructions an exit. */
#define ALWAYS_INLINE inline __attribute__((always_inline))

/* The vCPU whose session (begin to end) this thread is in; outer leads to those in whose devices it began. The signal handler marks
 * the one a tick is for, so that a tick that lands between the decision to enter and the entry itself is not lost: KVM looks at
 * immediate_exit after that. */
static __thread struct pykvm_vcpu *volatile current __attribute__((tls_model("initial-exec")));
static __thread int32_t thread_id __attribute__((tls_model("initial-exec")));
static __thread uint64_t thread_serial __attribute__((tls_model("initial-exec")));	/* unlike a thread's id, never used again */

static uint64_t serials;
static int32_t process_id;
static int kick_signal;		/* 0: none chosen yet */
static pthread_mutex_t signal_lock = PTHREAD_MUTEX_INITIALIZER;

uint64_t pykvm_rdtsc(void)
{
	return __builtin_ia32_rdtsc();
}

/* The result, or -errno: callers need no errno of their own thread. */
int pykvm_ioctl(int fd, unsigned long request, void *argument)
{
	int r = ioctl(fd, request, argument);

	return r < 0 ? -errno : r;
}

int pykvm_ioctl_value(int fd, unsigned long request, unsigned long argument)
{
	int r = ioctl(fd, request, argument);

	return r < 0 ? -errno : r;
}

static void on_signal(int signal, siginfo_t *info, void *context)
{
	struct pykvm_vcpu *v;

	(void)signal;
	(void)context;
	if (info->si_code != SI_TIMER)
		return;	/* who kicked has set immediate_exit */
	for (v = current; v; v = v->outer) {
		if (v == info->si_value.sival_ptr) {
			v->ticked = 1;
			v->run->immediate_exit = 1;
		}
	}
}

static int is_ours(int s)
{
	struct sigaction now;

	return s && !sigaction(s, NULL, &now) && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_signal;
}

/* A real-time signal that nobody in this process uses: an application's own handlers are never replaced. When the
 * application has since taken ours for itself, it may keep it, and we take another. */
static int choose_signal(void)
{
	struct sigaction old, ours;
	int s, result = -EBUSY;

	pthread_mutex_lock(&signal_lock);
	if (is_ours(kick_signal)) {
		result = 0;
		goto out;
	}
	for (s = SIGRTMAX; s >= SIGRTMIN; s--) {
		if (sigaction(s, NULL, &old) || (old.sa_flags & SA_SIGINFO) || old.sa_handler != SIG_DFL)
			continue;
		memset(&ours, 0, sizeof(ours));
		ours.sa_sigaction = on_signal;
		/* SA_RESTART: a late kick must not disturb the application's system calls; KVM_RUN never restarts. */
		ours.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
		sigemptyset(&ours.sa_mask);
		if (sigaction(s, &ours, NULL))
			continue;
		__atomic_store_n(&kick_signal, s, __ATOMIC_SEQ_CST);
		result = 0;
		break;
	}
out:
	pthread_mutex_unlock(&signal_lock);
	return result;
}

static void in_child(void)
{
	current = NULL;
	thread_id = 0;
	process_id = getpid();
}

static void watch_fork(void)
{
	process_id = getpid();
	pthread_atfork(NULL, NULL, in_child);
}

int pykvm_map_run(struct pykvm_vcpu *v, int fd, uint64_t size)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	void *p;

	pthread_once(&once, watch_fork);
	pthread_mutex_init(&v->lock, NULL);
	v->last = PYKVM_ERROR;	/* no exit waits for an answer */
	if (size < sizeof(struct kvm_run))
		return -EINVAL;
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return -errno;
	v->fd = fd;
	v->run = p;
	v->run_size = size;
	return 0;
}

static void delete_timer(struct pykvm_vcpu *v)
{
	if (v->timer_thread && v->timer_process == process_id)
		timer_delete(v->timer);
	v->timer_thread = 0;
}

/* A session of this process; tid alone may be what a forked child has inherited. */
static inline int is_bound(const struct pykvm_vcpu *v)
{
	return v->tid && v->process == process_id;
}

static inline int is_bound_here(const struct pykvm_vcpu *v)
{
	return is_bound(v) && v->tid == thread_id;
}

/* -EBUSY while a session lasts; force: there can be none, since nobody has this vCPU any more. */
int pykvm_unmap_run(struct pykvm_vcpu *v, int force)
{
	int busy;

	pthread_mutex_lock(&v->lock);
	busy = v->run && is_bound(v) && !force;
	if (v->run && !busy) {
		if (current == v)
			current = v->outer;
		delete_timer(v);
		munmap(v->run, v->run_size);
		v->run = NULL;
		v->tid = 0;
	}
	pthread_mutex_unlock(&v->lock);
	return busy ? -EBUSY : 0;
}

static int bind(struct pykvm_vcpu *v)
{
	sigset_t ours, before;
	int r = 0;

	pthread_mutex_lock(&v->lock);
	if (!v->run) {
		r = -EBADF;
	} else if (is_bound(v)) {
		r = -EBUSY;	/* another thread runs this vCPU, or a device of its own */
	} else {
		v->signal = __atomic_load_n(&kick_signal, __ATOMIC_SEQ_CST);
		sigemptyset(&ours);
		sigaddset(&ours, v->signal);
		pthread_sigmask(SIG_UNBLOCK, &ours, &before);
		v->was_blocked = (uint32_t)sigismember(&before, v->signal);
		v->outer = current;
		current = v;
		v->process = process_id;
		__atomic_store_n(&v->tid, thread_id, __ATOMIC_SEQ_CST);
	}
	pthread_mutex_unlock(&v->lock);
	return r;
}

static int start_timer(struct pykvm_vcpu *v, uint64_t first_ns, uint64_t interval_ns)
{
	struct itimerspec when;
	struct sigevent event;

	if (v->timer_thread != thread_serial || v->timer_signal != v->signal) {
		delete_timer(v);
		memset(&event, 0, sizeof(event));
		event.sigev_notify = SIGEV_THREAD_ID;
		event.sigev_signo = v->signal;
		event.sigev_value.sival_ptr = v;
		event.sigev_notify_thread_id = thread_id;
		if (timer_create(CLOCK_MONOTONIC, &event, &v->timer))
			return -errno;
		v->timer_thread = thread_serial;
		v->timer_process = process_id;
		v->timer_signal = v->signal;
	}
	when.it_value.tv_sec = (time_t)(first_ns / 1000000000u);
	when.it_value.tv_nsec = (long)(first_ns % 1000000000u);
	when.it_interval.tv_sec = (time_t)(interval_ns / 1000000000u);
	when.it_interval.tv_nsec = (long)(interval_ns % 1000000000u);
	if (timer_settime(v->timer, 0, &when, NULL))
		return -errno;
	v->armed = 1;
	return 0;
}

/* Bind the vCPU to this thread. first_ns: when the timer fires first, 0 for no timer; interval_ns: then how often. */
int pykvm_begin(struct pykvm_vcpu *v, uint64_t first_ns, uint64_t interval_ns)
{
	int r;

	if (!is_ours(kick_signal) && (r = choose_signal()) < 0)
		return r;
	if (!thread_id) {
		thread_id = (int32_t)syscall(SYS_gettid);
		thread_serial = __atomic_add_fetch(&serials, 1, __ATOMIC_SEQ_CST);
	}
	r = bind(v);
	if (r == 0 && first_ns) {
		r = start_timer(v, first_ns, interval_ns);
		if (r < 0)
			pykvm_end(v);
	}
	return r;
}

/* Does nothing in a thread that has not begun: whoever was interrupted on the way to begin may call it all the same. */
void pykvm_end(struct pykvm_vcpu *v)
{
	static const struct itimerspec never;
	sigset_t ours;

	if (!is_bound_here(v))
		return;
	current = v->outer;
	if (v->armed) {
		timer_settime(v->timer, 0, &never, NULL);
		v->armed = 0;
	}
	pthread_mutex_lock(&v->lock);
	v->kicked &= ~(uint32_t)PYKVM_KICKED_ITSELF;	/* that and a late tick were meant for this session only */
	v->ticked = 0;
	v->run->immediate_exit = v->kicked != 0;
	__atomic_store_n(&v->tid, 0, __ATOMIC_SEQ_CST);
	pthread_mutex_unlock(&v->lock);
	if (v->was_blocked) {
		sigemptyset(&ours);
		sigaddset(&ours, v->signal);
		pthread_sigmask(SIG_BLOCK, &ours, NULL);
		v->was_blocked = 0;
	}
}

/* From any thread: the vCPU's current KVM_RUN, or else its next one, returns EINTR. One signal is enough until that has happened: real-time
 * signals queue up, and a user's queue has an end. */
void pykvm_kick(struct pykvm_vcpu *v)
{
	uint32_t already;

	pthread_mutex_lock(&v->lock);
	if (v->run) {
		already = v->kicked;
		v->kicked |= thread_id && is_bound_here(v) ? PYKVM_KICKED_ITSELF : PYKVM_KICKED;
		__atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		if (!already && is_bound(v) && v->tid != thread_id)
			syscall(SYS_tgkill, process_id, v->tid, v->signal);
	}
	pthread_mutex_unlock(&v->lock);
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

/* The word for an access to a range, or LOOK when it has no room: a far offset, a wide value, an odd size, a REP. */
static ALWAYS_INLINE uint64_t pack_access(const struct pykvm_range *range, const struct access *a)
{
	uint64_t offset = a->at - range->base;
	int kind = (a->is_mmio ? PYKVM_MMIO_WRITE : PYKVM_OUT) + !a->is_write;

	if (a->count != 1 || offset > 0xffff || a->value >> 32 || !a->size || (a->size & (a->size - 1)))
		return pack(PYKVM_LOOK, a->is_mmio ? KVM_EXIT_MMIO : KVM_EXIT_IO);
	return pack(kind, a->value) | (uint64_t)__builtin_ctz(a->size) << 4 | (uint64_t)range->index << 6 | offset << 16;
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

/* Where the time of an exit's answer ends and that of the next KVM_RUN begins: one reading of the clock is both. The page fault that
 * the first record in a page costs comes between them, and is in nobody's time. Returns that reading, 0 when the ring is full. */
static inline uint64_t next_record(struct pykvm_ring *ring)
{
	uint64_t now = pykvm_rdtsc();

	close_record(ring, now);
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
	int is_access;

	for (;;) {
		if (ring) {
			before = next_record(ring);
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
		if (!v->native || !act(v, range, &a))
			return pack_access(range, &a);
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
}

/* Run until Python must see something: slot | value << 8, or 0 with the whole story in last. */
static inline uint64_t run_on(struct pykvm_vcpu *v)
{
	const struct pykvm_hot *h;

	if (v->stashed) {
		v->stashed = 0;
		v->last = v->stash;
		return 0;
	}
	v->reply_size = 0;
	v->last = v->kicked & PYKVM_KICKED_ITSELF ? interrupted(v) : step(v);
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
	return h->key == (uint32_t)v->last ? h->slot | v->last >> 32 << 8 : 0;
}

/* Answer the last exit, if it is one that waits for a reply. */
void pykvm_answer(struct pykvm_vcpu *v, uint64_t reply)
{
	if (v->reply_size && !v->stashed && v->run)
		answer(v, reply);
}

/* These two run the vCPU of this thread's session: each argument that Python need not hand over saves some hundred instructions an
 * exit. A child that was forked amid a session has none. */
uint64_t pykvm_run(void)
{
	struct pykvm_vcpu *v = current;

	return v ? run_on(v) : PYKVM_NO_SESSION;
}

/* The same, after answering the previous exit with reply. */
uint64_t pykvm_step(uint64_t reply)
{
	struct pykvm_vcpu *v = current;

	if (!v)
		return PYKVM_NO_SESSION;
	if (v->reply_size && !v->stashed) {
		if (v->reply_size < 8 && reply >> 8 * v->reply_size)
			return PYKVM_BAD_REPLY;
		answer(v, reply);
	}
	return run_on(v);
}

/* begin, one exit of whatever kind, end, in one call: a Python signal handler that raises cannot come between. No actions are
 * carried out, and an exit is not recorded when the ring is full: here is nobody to empty it. Returns what begin does. */
int pykvm_run_once(struct pykvm_vcpu *v, uint64_t first_ns, uint64_t interval_ns)
{
	struct pykvm_table *table;
	struct pykvm_ring *ring;
	int r = pykvm_begin(v, first_ns, interval_ns);

	if (r < 0)
		return r;
	table = v->table;
	ring = v->ring;
	v->table = NULL;
	if (ring && ring->used == ring->capacity && !ring->keep)
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
	pykvm_end(v);
	return 0;
}
