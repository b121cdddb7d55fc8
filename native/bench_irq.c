/* What an interrupt costs in plain C: the guest asks at a port, KVM_IRQ_LINE goes up and down, the guest's handler runs. See bench.h. */
#include "bench.h"

#include <errno.h>
#include <sys/ioctl.h>

/* Until the guest writes to stop_port. TSC units, or -errno; -EINTR for a signal: called again, it goes on. */
int64_t pykvm_bench_irq(int vm_fd, int fd, struct kvm_run *run, uint32_t gsi, uint16_t ask_port, uint16_t stop_port)
{
	uint64_t start = __builtin_ia32_rdtsc();
	struct kvm_irq_level line = { .irq = gsi };

	for (;;) {
		if (ioctl(fd, KVM_RUN, 0)) {
			if (errno == EINTR)
				run->immediate_exit = 0;
			return -errno;
		}
		if (run->exit_reason != KVM_EXIT_IO || run->io.direction != KVM_EXIT_IO_OUT)
			return -EPROTO;
		if (run->io.port == stop_port)
			return (int64_t)(__builtin_ia32_rdtsc() - start);
		if (run->io.port != ask_port)
			return -EPROTO;
		line.level = 1;
		if (ioctl(vm_fd, KVM_IRQ_LINE, &line))
			return -errno;
		line.level = 0;
		if (ioctl(vm_fd, KVM_IRQ_LINE, &line))
			return -errno;
	}
}
