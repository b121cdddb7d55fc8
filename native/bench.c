/* See bench.h. The functions return TSC units, or -errno. pykvm_bench_exits() gives -EINTR for a signal: called again, it goes on. */
#include "bench.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* The plain C run loop: handles PIO and MMIO exits as the smallest VMM would, until the guest writes to stop_port. */
int64_t pykvm_bench_exits(int fd, struct kvm_run *run, uint16_t stop_port)
{
	uint64_t start = __builtin_ia32_rdtsc();
	volatile uint64_t device = 0;

	for (;;) {
		if (ioctl(fd, KVM_RUN, 0)) {
			if (errno == EINTR)
				run->immediate_exit = 0;
			return -errno;
		}
		switch (run->exit_reason) {
		case KVM_EXIT_IO: {
			uint8_t *data = (uint8_t *)run + run->io.data_offset;

			if (run->io.direction == KVM_EXIT_IO_IN)
				memset(data, 0, (size_t)run->io.size * run->io.count);
			else if (run->io.port == stop_port)
				return (int64_t)(__builtin_ia32_rdtsc() - start);
			else
				device = *data;
			break;
		}
		case KVM_EXIT_MMIO:
			if (run->mmio.is_write)
				device = run->mmio.data[0];
			else
				memset(run->mmio.data, 0, run->mmio.len);
			break;
		default:
			(void)device;
			return -EPROTO;
		}
	}
}

/* VM and vCPU created, real-mode code run to its first exit: the ioctls that pykvm makes. handles: vCPU fd, VM fd, kvm_run, RAM, and the TSC
 * when the VM, the vCPU with its memory and registers, and the first exit were there. What is left over after an error goes with the process. */
int64_t pykvm_bench_alive(int kvm_fd, uint64_t run_size, const uint8_t *code, uint32_t size, uint64_t memory, uint64_t *handles)
{
	struct kvm_userspace_memory_region region = { .memory_size = memory };
	uint64_t start = __builtin_ia32_rdtsc(), identity = 0xfffbc000;
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	struct kvm_run *run;
	int vm, vcpu;
	void *ram;

	vm = ioctl(kvm_fd, KVM_CREATE_VM, 0);
	if (vm < 0)
		return -errno;
	handles[4] = __builtin_ia32_rdtsc() - start;
	if (ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000) || ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity))
		return -errno;
	ram = mmap(NULL, memory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (ram == MAP_FAILED)
		return -errno;
	region.userspace_addr = (uintptr_t)ram;
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		return -errno;
	memcpy((uint8_t *)ram + 0x1000, code, size);
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0)
		return -errno;
	run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		return -errno;
	if (ioctl(vcpu, KVM_GET_SREGS, &sregs))
		return -errno;
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) || ioctl(vcpu, KVM_GET_REGS, &regs))
		return -errno;
	regs.rip = 0x1000;
	regs.rflags = 2;
	if (ioctl(vcpu, KVM_SET_REGS, &regs))
		return -errno;
	handles[5] = __builtin_ia32_rdtsc() - start;
	if (ioctl(vcpu, KVM_RUN, 0))
		return -errno;
	if (run->exit_reason != KVM_EXIT_HLT)
		return -EPROTO;
	handles[0] = (uint64_t)vcpu;
	handles[1] = (uint64_t)vm;
	handles[2] = (uintptr_t)run;
	handles[3] = (uintptr_t)ram;
	handles[6] = __builtin_ia32_rdtsc() - start;
	return (int64_t)handles[6];
}

/* The end of what pykvm_bench_alive() has made. */
void pykvm_bench_gone(uint64_t run_size, uint64_t memory, const uint64_t *handles)
{
	munmap((void *)(uintptr_t)handles[2], run_size);
	close((int)handles[0]);
	close((int)handles[1]);
	munmap((void *)(uintptr_t)handles[3], memory);
}

int64_t pykvm_bench_start(int kvm_fd, uint64_t run_size, const uint8_t *code, uint32_t size, uint64_t memory)
{
	uint64_t start = __builtin_ia32_rdtsc(), handles[7];
	int64_t r = pykvm_bench_alive(kvm_fd, run_size, code, size, memory, handles);

	if (r < 0)
		return r;
	pykvm_bench_gone(run_size, memory, handles);
	return (int64_t)(__builtin_ia32_rdtsc() - start);
}
