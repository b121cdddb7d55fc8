/* Sessions: a vCPU bound to the thread that runs it (begin to end), and how its KVM_RUN is interrupted: kicks, time limits, the signal for both.
 * See runloop.h. The ioctl wrappers are here too. */
#define _GNU_SOURCE
#include "runloop.h"
#include "turn.h"

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

/* The vCPU whose session (begin to end) this thread is in; outer leads to those in whose devices it began. The signal handler marks
 * the one a tick is for, so that a tick that lands between the decision to enter and the entry itself is not lost: KVM looks at
 * immediate_exit after that. */
__thread struct pykvm_vcpu *volatile pykvm_current __attribute__((tls_model("initial-exec")));
struct pykvm_turn pykvm_turn;
static __thread int32_t thread_id __attribute__((tls_model("initial-exec")));
static __thread uint64_t thread_serial __attribute__((tls_model("initial-exec")));	/* unlike a thread's id, never used again; 0: none yet */

static uint64_t serials;
static int32_t process_id;
static int kick_signal;		/* 0: none chosen yet */
static pthread_mutex_t signal_lock = PTHREAD_MUTEX_INITIALIZER;

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
	for (v = pykvm_current; v; v = v->outer) {
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
	pykvm_current = NULL;
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
		if (pykvm_current == v)
			pykvm_current = v->outer;
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
		v->again.reason = 0;	/* another loop may do otherwise with the same access */
		v->outer = pykvm_current;
		pykvm_current = v;
		v->process = process_id;
		v->thread = thread_serial;
		v->held = NULL;
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

/* The serial number of this thread. */
uint64_t pykvm_this_thread(void)
{
	if (!thread_id) {
		thread_id = (int32_t)syscall(SYS_gettid);
		thread_serial = __atomic_add_fetch(&serials, 1, __ATOMIC_SEQ_CST);
	}
	return thread_serial;
}

/* Bind the vCPU to this thread. first_ns: when the timer fires first, 0 for no timer; interval_ns: then how often. */
int pykvm_begin(struct pykvm_vcpu *v, uint64_t first_ns, uint64_t interval_ns)
{
	int r;

	if (!is_ours(kick_signal) && (r = choose_signal()) < 0)
		return r;
	pykvm_this_thread();
	v->sessions++;
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
	pykvm_current = v->outer;
	pykvm_leave_devices(v);
	pykvm_give_turn(v->tid);
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
