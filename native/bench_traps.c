/* What `pykvm bench exits` compares with, for the exits that the plain loop of bench.c does not know. See bench.h. All return TSC units or
 * -errno; -EINTR for a signal. */
#include "kvm_compat.h"
#include "bench.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define PAGE 4096UL

static int serve_io(struct kvm_run *run, volatile uint64_t *device)
{
	uint8_t *data = (uint8_t *)run + run->io.data_offset;

	if (run->io.direction == KVM_EXIT_IO_IN)
		memset(data, 0, (size_t)run->io.size * run->io.count);
	else
		*device = *data;
	return 0;
}

/* The loop for MSRs, hypercalls, HLT, coalesced writes and what would end a run. Until the guest writes to stop_port, or, with a limit,
 * until so many exits have come. A DEBUG exit moves RIP by skip bytes, through the registers that kvm_run synchronizes. ring: of
 * coalesced writes, or NULL. only: one more reason that may come; with a limit, the only one. Another is -EPROTO. */
int64_t pykvm_bench_traps(int fd, struct kvm_run *run, uint16_t stop_port, uint32_t limit, uint32_t only, uint32_t skip,
			  struct kvm_coalesced_mmio_ring *ring)
{
	uint64_t start = __builtin_ia32_rdtsc();
	const uint32_t room = ring ? (PAGE - sizeof(*ring)) / sizeof(ring->coalesced_mmio[0]) : 0;
	volatile uint64_t device = 0;
	uint32_t exits = 0;

	for (;;) {
		if (ioctl(fd, KVM_RUN, 0) && !(errno == EFAULT && only == KVM_EXIT_MEMORY_FAULT)) {
			if (errno == EINTR)
				run->immediate_exit = 0;
			return -errno;
		}
		if (ring)
			for (; ring->first != ring->last; ring->first = (ring->first + 1) % room)
				device = ring->coalesced_mmio[ring->first].data[0];
		if (limit && run->exit_reason != only)
			return -EPROTO;
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			if (run->io.direction == KVM_EXIT_IO_OUT && run->io.port == stop_port)
				return (int64_t)(__builtin_ia32_rdtsc() - start);
			serve_io(run, &device);
			break;
		case KVM_EXIT_MMIO:
			if (run->mmio.is_write)
				device = run->mmio.data[0];
			else
				memset(run->mmio.data, 0, run->mmio.len);
			break;
		case KVM_EXIT_X86_RDMSR:
			run->msr.data = 0;
			run->msr.error = 0;
			break;
		case KVM_EXIT_X86_WRMSR:
			device = run->msr.data;
			run->msr.error = 0;
			break;
		case KVM_EXIT_HYPERCALL:
			run->hypercall.ret = 0;
			break;
		case KVM_EXIT_DEBUG:
			if (skip) {
				run->s.regs.regs.rip += skip;
				run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
			}
			break;
		case KVM_EXIT_HLT:
			break;
		default:
			if (!limit && run->exit_reason != only)
				return -EPROTO;
		}
		if (limit && ++exits == limit)
			return (int64_t)(__builtin_ia32_rdtsc() - start);
	}
}

/* KVM_RUN that comes back before it enters the guest: the system call, KVM's taking and leaving of the vCPU, and nothing of an exit. */
int64_t pykvm_bench_boundary(int fd, struct kvm_run *run, uint32_t count)
{
	uint64_t start;
	uint32_t i;

	run->immediate_exit = 1;
	ioctl(fd, KVM_RUN, 0);	/* what the last exit still waits for is done here */
	start = __builtin_ia32_rdtsc();
	for (i = 0; i < count; i++) {
		run->immediate_exit = 1;
		if (!ioctl(fd, KVM_RUN, 0) || errno != EINTR) {
			run->immediate_exit = 0;
			return -EPROTO;
		}
	}
	start = __builtin_ia32_rdtsc() - start;
	run->immediate_exit = 0;
	return (int64_t)start;
}

/* A chain of dependent multiplications: the same work each time, so what it takes tells how fast this CPU runs just now. */
int64_t pykvm_bench_spin(uint32_t count)
{
	uint64_t start = __builtin_ia32_rdtsc(), x = start | 1;

	for (; count; count--)
		__asm__ volatile("imul %0, %0" : "+r"(x));
	return (int64_t)(__builtin_ia32_rdtsc() - start);
}

/* Take host memory away from a range, and with it what KVM has mapped of it; bring back a page each stride bytes on the
 * host's side, none with a stride of 0. */
int64_t pykvm_bench_cool(uint64_t hva, uint64_t size, uint64_t stride)
{
	uint8_t *from = (uint8_t *)(uintptr_t)hva;
	uint64_t i;

	madvise(from, size, MADV_NOHUGEPAGE);	/* fails where there are no huge pages: then none come */
	if (madvise(from, size, MADV_DONTNEED))
		return -errno;
	for (i = 0; stride && i < size; i += stride)
		*(volatile uint8_t *)(from + i) = 1;
	return 0;
}
