/* Which instructions of user space lie between two KVM_RUNs of a process: it is traced, and single-stepped from the one to the next.
 * See bench.h and pykvm/bench/steps.py. Functions return -errno. */
#include "bench.h"

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>

#define SYSCALL_STOP (SIGTRAP | 0x80)	/* PTRACE_O_TRACESYSGOOD */
#define SYSCALL_INSN 0x050f

/* In the process that is to be traced: stops until its parent goes on with it. */
int pykvm_bench_traced(void)
{
	if (ptrace(PTRACE_TRACEME, 0, NULL, NULL))
		return -errno;
	return raise(SIGSTOP) ? -errno : 0;
}

/* The process goes on and stops again, with this signal; others, which would come between (timers), it does not get. */
static int go_on(int pid, int how, int stop, struct user_regs_struct *regs)
{
	int status;

	do {
		if (ptrace(how, pid, NULL, NULL) || waitpid(pid, &status, 0) < 0)
			return -errno;
		if (!WIFSTOPPED(status))
			return -ECHILD;
	} while (WSTOPSIG(status) != stop);
	return ptrace(PTRACE_GETREGS, pid, NULL, regs) ? -errno : 0;
}

static int is_kvm_run(const struct user_regs_struct *regs, uint64_t number)
{
	return number == SYS_ioctl && regs->rsi == KVM_RUN;
}

/* Wait for what pykvm_bench_traced() does. */
int pykvm_bench_trace(int pid)
{
	int status;

	if (waitpid(pid, &status, 0) < 0)
		return -errno;
	if (!WIFSTOPPED(status))
		return -ECHILD;
	return ptrace(PTRACE_SETOPTIONS, pid, NULL, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL) ? -errno : 0;
}

/* Let it make this many KVM_RUNs, then step to the next: the address of each instruction up to and with that one's SYSCALL. How many; more
 * than there is room for are -E2BIG. */
int64_t pykvm_bench_steps(int pid, uint32_t runs, uint64_t *at, uint32_t room)
{
	struct user_regs_struct regs;
	uint32_t count = 0;
	int r;

	while (runs) {
		r = go_on(pid, PTRACE_SYSCALL, SYSCALL_STOP, &regs);	/* into a system call */
		if (r)
			return r;
		runs -= is_kvm_run(&regs, regs.orig_rax);
		r = go_on(pid, PTRACE_SYSCALL, SYSCALL_STOP, &regs);	/* and out of it */
		if (r)
			return r;
	}
	for (;;) {
		if (count == room)
			return -E2BIG;
		at[count++] = regs.rip;
		if (is_kvm_run(&regs, regs.rax) && (ptrace(PTRACE_PEEKTEXT, pid, regs.rip, NULL) & 0xffff) == SYSCALL_INSN)
			return count;
		r = go_on(pid, PTRACE_SINGLESTEP, SIGTRAP, &regs);
		if (r)
			return r;
	}
}
