/* What bench state compares restore, fork, reset and save with: the ioctls, mmaps and copies that cannot be done without, and nothing else. */
#define _GNU_SOURCE
#include "bench.h"
#include "migrate.h"
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SET(fd, name, argument)			\
	do {					\
		if (ioctl(fd, name, argument) < 0)	\
			return -errno;		\
	} while (0)

/* A VM whose memory is the file's, copy-on-write, with one vCPU in the state of c. handles: vCPU fd, VM fd, kvm_run, RAM, as of
 * pykvm_bench_alive(). */
static int make(int kvm_fd, int file, uint64_t size, const struct pykvm_reset_vcpu *c, struct kvm_cpuid2 *cpuid, uint64_t run_size,
		uint64_t *handles)
{
	struct kvm_userspace_memory_region region = { .memory_size = size };
	uint64_t identity = 0xfffbc000;
	struct kvm_clock_data clock = { 0 };
	struct kvm_run *run;
	int vm, vcpu, done;
	void *ram;

	vm = ioctl(kvm_fd, KVM_CREATE_VM, 0);
	if (vm < 0)
		return -errno;
	handles[1] = (uint64_t)vm;
	SET(vm, KVM_SET_TSS_ADDR, 0xfffbd000);
	SET(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity);
	ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
	if (ram == MAP_FAILED)
		return -errno;
	handles[3] = region.userspace_addr = (uintptr_t)ram;
	SET(vm, KVM_SET_USER_MEMORY_REGION, &region);
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0)
		return -errno;
	handles[0] = (uint64_t)vcpu;
	run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		return -errno;
	handles[2] = (uintptr_t)run;
	SET(vcpu, KVM_SET_CPUID2, cpuid);
	SET(vcpu, KVM_SET_SREGS, &c->sregs);
	if (c->has_xcrs)
		SET(vcpu, KVM_SET_XCRS, &c->xcrs);
	SET(vcpu, KVM_SET_XSAVE, c->xsave);
	SET(vcpu, KVM_SET_REGS, &c->regs);
	SET(vcpu, KVM_SET_DEBUGREGS, &c->debugregs);
	done = ioctl(vcpu, KVM_SET_MSRS, c->msrs);
	if (done != (int)c->msrs->nmsrs)
		return done < 0 ? -errno : -EINVAL;
	SET(vcpu, KVM_SET_VCPU_EVENTS, &c->events);
	SET(vm, KVM_SET_CLOCK, &clock);
	run->cr8 = c->sregs.cr8;
	return 0;
}

/* From a memory file to the guest's next exit. Returns 0 or -errno. */
int pykvm_bench_restore(int kvm_fd, const char *path, uint64_t size, const struct pykvm_reset_vcpu *c, struct kvm_cpuid2 *cpuid,
			uint64_t run_size, uint64_t *handles)
{
	int file = open(path, O_RDONLY | O_CLOEXEC), r;

	if (file < 0)
		return -errno;
	r = make(kvm_fd, file, size, c, cpuid, run_size, handles);
	close(file);
	if (!r)
		SET((int)handles[0], KVM_RUN, 0);
	return r;
}

/* Memory to a memfd, mapped privately in place and in a VM of its own. Returns 0 or -errno. */
int pykvm_bench_fork(int kvm_fd, uint64_t ram, uint64_t size, int from, const struct pykvm_reset_vcpu *c, struct kvm_cpuid2 *cpuid,
		     uint64_t run_size, uint64_t *handles)
{
	int file = memfd_create("bench", MFD_CLOEXEC), r;
	uint8_t *to;

	if (file < 0 || ftruncate(file, (off_t)size))
		return -errno;
	to = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (to == MAP_FAILED)
		return -errno;
	pykvm_copy_pages(to, (const uint8_t *)(uintptr_t)ram, size, from);
	munmap(to, size);
	r = pykvm_remap_private(ram, size, file);
	if (!r)
		r = make(kvm_fd, file, size, c, cpuid, run_size, handles);
	handles[4] = (uint64_t)file;	/* what the next one's memory is a private mapping of */
	return r;
}

/* Run to an exit and reset, so often. Returns TSC units, or -errno. */
int64_t pykvm_bench_resets(struct pykvm_reset *r, uint32_t count)
{
	uint64_t start = __builtin_ia32_rdtsc();

	for (uint32_t i = 0; i < count; i++) {
		SET(r->vcpu[0].v->fd, KVM_RUN, 0);
		if (pykvm_reset(r))
			return -errno;
	}
	return (int64_t)(__builtin_ia32_rdtsc() - start);
}

/* All of memory to a file, with a checksum for each chunk, and on the disk. Returns 0 or -errno. */
int pykvm_bench_save(const char *path, const uint8_t *memory, uint64_t size, uint32_t *sums)
{
	int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), r = 0;

	if (file < 0)
		return -errno;
	for (uint64_t at = 0; at < size && !r; at += PYKVM_CHUNK) {
		uint64_t n = size - at < PYKVM_CHUNK ? size - at : PYKVM_CHUNK;

		sums[at / PYKVM_CHUNK] = pykvm_crc32c(0, memory + at, n);
		for (uint64_t done = 0; done < n;) {
			ssize_t w = pwrite(file, memory + at + done, n - done, (off_t)(at + done));

			if (w <= 0) {
				r = w ? -errno : -EIO;
				break;
			}
			done += (uint64_t)w;
		}
	}
	if (!r && fsync(file))
		r = -errno;
	close(file);
	return r;
}
