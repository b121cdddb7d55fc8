/* The native half of pykvm's run loop: KVM_RUN until an exit that Python must see.
 *
 * No device knowledge and no policy live here. Python registers a table of ranges, each with an action; step()
 * answers the previous exit, enters the guest, counts, records, and packs a claimed access into one 64-bit word so that
 * an exit costs one call. See runloop.c and session.c for the functions and pykvm/runner.py for the Python side.
 */
#ifndef PYKVM_RUNLOOP_H
#define PYKVM_RUNLOOP_H

#include <pthread.h>
#include <stdint.h>
#include <time.h>
#include <linux/kvm.h>

#include "lock.h"

/* What an exit is, in one word (pykvm_vcpu.last). Bits 0-3: one of these. For the four accesses: bits 4-5 log2 of the size,
 * bits 6-15 the index of the range, bits 16-31 the offset in it; what a write writes is in pykvm_vcpu.value. For LOOK the exit
 * reason, for ERROR the errno, are in bits 32-63. */
enum {
	PYKVM_LOOK = 0,		/* an exit that Python decodes from struct kvm_run */
	PYKVM_OUT = 1,
	PYKVM_IN = 2,
	PYKVM_MMIO_WRITE = 3,
	PYKVM_MMIO_READ = 4,
	PYKVM_ERROR = 5,	/* KVM_RUN failed; EINTR and EAGAIN are among its answers */
	PYKVM_DRAIN = 6,	/* empty the record ring and the sinks, then step again */
};

/* The low half of that word names an access. Python gives those it meets a slot, 1 to 253; from then on step() returns it: an integer
 * that CPython has at hand and need not make. 0 means: look at last. */
#define PYKVM_NO_SESSION 255	/* a slot that is never given: this thread runs no vCPU */
#define PYKVM_BAD_REPLY 254	/* nor is this one: the reply has more bits than the access */
#define PYKVM_HOT 64		/* places, a power of two */
struct pykvm_hot {
	uint32_t key;
	uint32_t slot;
};

/* The last access that went to Python, to know it again: its name is the low half of its word. reason 0: none. */
struct pykvm_again {
	uint64_t first, second;
	uint32_t reason, name, size, is_write;
};

/* What the native loop may do with a range without asking Python. */
enum {
	PYKVM_TO_PYTHON = 0,
	PYKVM_CONSTANT = 1,	/* writes vanish, reads give the value */
	PYKVM_APPEND = 2,	/* written bytes go to the range's sink; reads go to Python */
};

/* Who kicked. A device that stops the run it is called from wants no further KVM_RUN. */
enum {
	PYKVM_KICKED = 1,
	PYKVM_KICKED_ITSELF = 2,
};

#define PYKVM_REASONS 64	/* exit reasons counted one by one; larger ones share the last place */
#define PYKVM_MAX_RANGES 1024

struct pykvm_sink {
	uint32_t used, capacity;
	uint8_t *data;
};

struct pykvm_range {
	uint64_t base, length, value;
	struct pykvm_sink *sink;
	uint32_t index;
	uint32_t action;
};

struct pykvm_table {
	uint32_t pio_count, mmio_count;
	struct pykvm_range *pio, *mmio;		/* sorted by base, disjoint */
};

/* One exit. The same record serves statistics, ledger, trace and explainer. */
struct pykvm_record {
	uint64_t tsc_before;	/* just before KVM_RUN */
	uint64_t tsc_after;	/* just after it */
	uint64_t tsc_handled;	/* when the answer was there; 0 while it is not */
	uint64_t rip;		/* as KVM left it, 0 without KVM_CAP_SYNC_REGS; pykvm/debug/insn.py finds insn_rip */
	uint64_t qualifier;	/* port, gpa, MSR index, suberror: what the reason calls for */
	uint64_t value;		/* first element written, or read once it is answered */
	uint32_t reason;
	uint32_t count;		/* REP count of PIO, else 1 */
	uint16_t vcpu;
	uint8_t size;		/* bytes of one element */
	uint8_t is_write;
	uint32_t reserved;
};

#define PYKVM_RECORDS_IN_A_PAGE 64

struct pykvm_ring {
	uint32_t used, capacity;
	struct pykvm_record *data;
	struct pykvm_record *open;	/* the last exit's, which may still wait for its answer; NULL when that exit has none here */
	uint64_t lost;			/* exits that found no room */
	struct pykvm_moments *moments;	/* where trace.c keeps more of each exit; NULL: nowhere */
	uint32_t keep;			/* a full ring loses what comes; without this it stops the loop until Python has emptied it */
	uint32_t reserved;
};

/* Where code of the guest's lies in this process: a page by its linear address, for as long as the entries of the page tables that lead to it
 * are what they were. */
struct pykvm_code_page {
	uint64_t gva, cr0, cr3, cr4, efer;
	const uint8_t *host;		/* NULL: the guest has no memory there */
	const uint8_t *entry[5];	/* the entries, in this process; NULL: not there */
	uint64_t value[5];		/* and what was in them */
	uint32_t entries, entry_size;
	uint32_t known, reserved;
};

#define PYKVM_CODE_PAGES 64	/* a power of two */
#define PYKVM_CODE_BEFORE 48	/* bytes before RIP: some hosts leave it behind the instruction, and what is before that tells where it begins */
#define PYKVM_CODE_SIZE 64
#define PYKVM_DETAIL 256	/* bytes, as many as the union in struct kvm_run has */

/* An exit's registers, the code around RIP, and what else the kernel says of it. All of one moment: just before the next KVM_RUN. */
struct pykvm_moment {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	uint64_t code_gva;		/* the linear address of code */
	uint32_t code_first, code_end;	/* which bytes of it are there */
	uint32_t detail_size, reserved;
	uint8_t code[PYKVM_CODE_SIZE];
	uint8_t detail[PYKVM_DETAIL];	/* of PIO and MMIO with a count the elements, else the union in struct kvm_run */
};

/* The moments of a ring's records. */
struct pykvm_moments {
	struct pykvm_moment *data;	/* as many as the ring has records */
	uint32_t used;			/* records that have theirs */
	uint32_t reserved;
	struct pykvm_code_page pages[PYKVM_CODE_PAGES];
};

/* Why pykvm_steps() has come back. */
enum {
	PYKVM_STEP_DONE = 1,	/* as many as asked for, a place to stop at, watched memory that has changed, or is elsewhere */
	PYKVM_STEP_HARD = 2,	/* the next instruction is not plain */
	PYKVM_STEP_PAGE = 3,	/* nor is the page known that it is in */
	PYKVM_STEP_EXIT = 4,	/* an exit that is not a step's; pykvm_vcpu.last has it */
};

/* Memory that is compared after each step. */
struct pykvm_watch {
	struct pykvm_code_page page;
	const uint8_t *before;
	uint32_t offset, size;		/* inside that page */
};

/* Single steps of one vCPU, from rip on. Addresses are linear. */
struct pykvm_steps {
	uint64_t count, done;
	uint64_t rip;
	uint64_t first, size;		/* a step that leads out of there is the last */
	const uint64_t *stops;		/* so is one that leads to one of these */
	const uint64_t *planted;	/* sorted: breakpoints in the guest's code, which are not stepped over here */
	struct pykvm_watch *watches;
	uint32_t stop_count, planted_count, watch_count;
	uint32_t why;
	uint32_t is_64_bit, reserved;
	struct kvm_sregs sregs;		/* as they are during all of it */
	struct pykvm_code_page code[PYKVM_CODE_PAGES];
};

/* What a step touches lies together: after an exit the TLB is cold, and each page costs. */
struct pykvm_vcpu {
	int fd;
	uint32_t id;
	struct kvm_run *run;
	uint64_t run_size;
	struct pykvm_table *table;
	struct pykvm_ring *ring;
	const struct pykvm_range *recent[2];	/* of the last PIO and the last MMIO access */
	struct pykvm_again again;
	struct pykvm_hot hot[PYKVM_HOT];
	uint64_t counts[PYKVM_REASONS];
	uint64_t last;			/* what the last step found */
	uint64_t value;			/* what that access writes */
	uint64_t stash;			/* an exit that waits until Python has emptied the sinks ... */
	uint32_t stashed;		/* ... if there is one */
	uint32_t appended;		/* a sink has bytes that Python has not seen */
	struct kvm_coalesced_mmio_ring *coalesced;	/* NULL until a device asks for it; KVM fills it, Python empties it */
	uint32_t reply_size;		/* bytes the next reply has, 0: none is due */
	uint8_t *reply_at;
	struct pykvm_lock *devices;	/* their lock, where other vCPUs share them; else NULL */
	struct pykvm_lock *held;	/* the same, from an access for Python until that is answered */
	uint64_t thread;		/* the serial number of the session's thread */
	uint32_t native;		/* may the table's actions be carried out here? */
	uint32_t kicked;		/* PYKVM_KICKED bits since the last EINTR */
	uint32_t ticked;		/* the session's timer fired since the last EINTR */
	uint32_t was_kicked, was_ticked;	/* what the last EINTR found */
	uint32_t sessions;		/* how many there have been: who sees the same number knows that the guest has not run */
	int32_t tid;			/* the thread of the session, 0: none */
	int32_t process;		/* and its process: a forked child inherits tid */
	int32_t signal;			/* the signal that interrupts it */
	uint32_t was_blocked;		/* that signal was blocked in that thread: block it again */
	struct pykvm_vcpu *outer;	/* the session in which a device began this one */
	pthread_mutex_t lock;		/* of tid, kicked and the mapping's lifetime: who kicks may be in any thread */
	uint64_t timer_thread;		/* serial number of the thread the timer is directed at, 0: no timer */
	int32_t timer_process;		/* a forked child inherits no timers, but may have its own of the same name */
	int32_t timer_signal;		/* and the signal it sends */
	uint32_t armed;			/* it ticks */
	timer_t timer;
};

/* The vCPU of this thread's session; session.c keeps it, each step reads it. */
extern __thread struct pykvm_vcpu *volatile pykvm_current __attribute__((tls_model("initial-exec"), visibility("hidden")));

static inline void pykvm_leave_devices(struct pykvm_vcpu *v)
{
	if (v->held) {
		pykvm_back_to(v->held, v->held->depth - 1);
		v->held = NULL;
	}
}

int pykvm_ioctl(int fd, unsigned long request, void *argument);
int pykvm_ioctl_value(int fd, unsigned long request, unsigned long argument);
int pykvm_map_run(struct pykvm_vcpu *v, int fd, uint64_t size);
int pykvm_unmap_run(struct pykvm_vcpu *v, int force);
uint64_t pykvm_this_thread(void);
int pykvm_begin(struct pykvm_vcpu *v, uint64_t first_ns, uint64_t interval_ns);
void pykvm_end(struct pykvm_vcpu *v);
int pykvm_run_once(struct pykvm_vcpu *v, uint64_t first_ns, uint64_t interval_ns);
uint32_t pykvm_run(void);
uint32_t pykvm_step(uint64_t reply);
void pykvm_answer(struct pykvm_vcpu *v, uint64_t reply);
void pykvm_remember(struct pykvm_vcpu *v, uint32_t key, uint32_t slot);
void pykvm_forget(struct pykvm_vcpu *v);
void pykvm_kick(struct pykvm_vcpu *v);
void pykvm_handled(struct pykvm_vcpu *v);
uint64_t pykvm_rdtsc(void);
int pykvm_leads_there(const struct pykvm_code_page *p);
const struct pykvm_code_page *pykvm_find_code(const struct pykvm_code_page *pages, const struct kvm_sregs *s, uint64_t page);
void pykvm_once(struct pykvm_vcpu *v);
int pykvm_is_plain(const uint8_t *code, uint32_t size, int is_64_bit);
int pykvm_steps(struct pykvm_vcpu *v, struct pykvm_steps *s, uint64_t first_ns, uint64_t interval_ns);
int pykvm_keep_moment(const struct pykvm_vcpu *v, const struct pykvm_ring *ring);
int pykvm_keep_code(const struct pykvm_moments *all, struct pykvm_moment *m);

#endif
