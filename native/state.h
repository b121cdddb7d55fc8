/* What saved states need for each page: memory files with checksums, copies without zero pages, and the batch of a reset.
 * See state.c, and pykvm/state/ for the Python side. */
#ifndef PYKVM_STATE_H
#define PYKVM_STATE_H

#include <stdint.h>
#include <linux/kvm.h>
#include "runloop.h"

#define PYKVM_CHUNK (1u << 20)	/* bytes of memory that share a checksum */

/* For ``file`` of the next two functions, which is else the fd that the memory is a private mapping of. */
#define PYKVM_ANONYMOUS -1
#define PYKVM_ALL -2	/* nothing is known of it: read every page */

/* A memory slot that is put back. ``base`` has the bytes as they were; bitmaps have a bit for each page. */
struct pykvm_reset_slot {
	struct kvm_userspace_memory_region region;
	uint8_t *base;
	uint64_t *dirty;	/* room for KVM's dirty log */
	uint64_t *host;		/* what the host has written; taken by each reset */
};

/* A vCPU that is put back; pointers that are NULL are left alone. */
struct pykvm_reset_vcpu {
	struct pykvm_vcpu *v;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_vcpu_events events;
	struct kvm_debugregs debugregs;
	struct kvm_xcrs xcrs;
	struct kvm_mp_state mp_state;
	void *xsave;
	struct kvm_msrs *msrs;
	struct kvm_lapic_state *lapic;
	uint32_t has_xcrs, has_debugregs;
};

struct pykvm_reset {
	int vm_fd;
	uint32_t slots, vcpus, irqchips;
	struct pykvm_reset_slot *slot;
	struct pykvm_reset_vcpu *vcpu;
	struct kvm_irqchip *irqchip;
	struct kvm_pit_state2 *pit;
	uint32_t syncs;		/* registers may go through kvm_run */
	uint32_t shadows;	/* KVM keeps shadows of the guest's page tables; else only the CPU's TLB remembers them */
	uint64_t guarded, guarded_end;	/* gpas: when a page there is put back, what is remembered of page tables may be wrong */
	struct kvm_userspace_memory_region spare;	/* a slot that could be there, and is not */
	uint64_t pages;		/* put back by the last reset */
	uint64_t flushes;	/* resets that had page tables forgotten */
	const char *failed;	/* the ioctl that has */
};

int pykvm_reset(struct pykvm_reset *r);
int64_t pykvm_save_pages(int fd, const uint8_t *memory, uint64_t size, uint32_t *sums, int file);
int64_t pykvm_check_pages(int fd, uint64_t size, const uint32_t *sums);
uint64_t pykvm_copy_pages(uint8_t *to, const uint8_t *from, uint64_t size, int file);
int pykvm_remap_private(uint64_t hva, uint64_t size, int fd);
int pykvm_exchange(const char *a, const char *b);

#endif
