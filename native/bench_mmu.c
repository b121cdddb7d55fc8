/* What guests that stress paging are compared with: the same work in a process. See bench.h; TSC units, an address, or -errno. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ul
#define HUGE_PAGE (2ul << 20)
#define MAP_2M_PAGES (MAP_HUGETLB | 21 << 26)

/*
 * Private memory at a multiple of 2 MiB, with a guard page at each end, so that it stays a VMA of its own and smaps tells of it alone.
 * kind: 0 4 KiB pages only, 1 transparent huge pages asked for, 2 hugetlb.
 */
int64_t pykvm_bench_map(uint64_t size, int kind)
{
	uint64_t all = size + 2 * HUGE_PAGE;
	uint8_t *reserved = mmap(NULL, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint8_t *start;
	int error;

	if (reserved == MAP_FAILED)
		return -errno;
	start = (uint8_t *)(((uintptr_t)reserved + HUGE_PAGE) & -HUGE_PAGE);
	if (start == reserved)
		start += HUGE_PAGE;
	munmap(reserved, start - PAGE - reserved);
	munmap(start + size + PAGE, reserved + all - (start + size + PAGE));
	if (mmap(start, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | (kind == 2 ? MAP_2M_PAGES : 0), -1, 0) ==
		    MAP_FAILED ||
	    (kind < 2 && madvise(start, size, kind ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) && (kind || errno != EINVAL))) {
		error = errno;
		munmap(start - PAGE, size + 2 * PAGE);
		return -error;
	}
	return (int64_t)(uintptr_t)start;
}

void pykvm_bench_unmap(uint64_t address, uint64_t size)
{
	munmap((uint8_t *)(uintptr_t)address - PAGE, size + 2 * PAGE);
}

/* Memory as it was when it was new: each page faults again. */
int64_t pykvm_bench_discard(uint64_t address, uint64_t size)
{
	return madvise((void *)(uintptr_t)address, size, MADV_DONTNEED) ? -errno : 0;
}

/* A page of machine code, which can be executed and not written; unmapped by munmap of one page. */
int64_t pykvm_bench_code(const uint8_t *code, uint32_t size)
{
	void *page;

	if (size > PAGE)
		return -EINVAL;
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED)
		return -errno;
	memcpy(page, code, size);
	if (mprotect(page, PAGE, PROT_READ | PROT_EXEC)) {
		munmap(page, PAGE);
		return -EACCES;
	}
	return (int64_t)(uintptr_t)page;
}

void pykvm_bench_forget_code(uint64_t code)
{
	munmap((void *)(uintptr_t)code, PAGE);
}

int64_t pykvm_bench_call(uint64_t code, uint64_t a, uint64_t b, uint64_t c, uint64_t *result)
{
	uint64_t (*function)(uint64_t, uint64_t, uint64_t) = (uint64_t (*)(uint64_t, uint64_t, uint64_t))(uintptr_t)code;
	uint64_t start = __builtin_ia32_rdtsc();

	*result = function(a, b, c);
	return (int64_t)(__builtin_ia32_rdtsc() - start);
}

static void touch(uint64_t address, uint64_t pages)
{
	while (pages--) {
		*(volatile uint64_t *)(uintptr_t)address = address;
		address += PAGE;
	}
}

/* Page-table changes as a process can have them: all pages made accessible at once, each touched, all made inaccessible. */
int64_t pykvm_bench_map_unmap(uint64_t address, uint64_t pages, uint64_t passes)
{
	void *start = (void *)(uintptr_t)address;
	uint64_t from = __builtin_ia32_rdtsc();

	while (passes--) {
		if (mprotect(start, pages * PAGE, PROT_READ | PROT_WRITE))
			return -errno;
		touch(address, pages);
		if (mprotect(start, pages * PAGE, PROT_NONE))
			return -errno;
	}
	return (int64_t)(__builtin_ia32_rdtsc() - from);
}

static void visit(uint64_t address, uint64_t pages)
{
	while (pages--) {
		(void)*(volatile uint64_t *)(uintptr_t)address;
		address += PAGE;
	}
}

static int pass_on(int in, int out)
{
	char byte;
	ssize_t n;

	do
		n = read(in, &byte, 1);
	while (n < 0 && errno == EINTR);
	if (n != 1)
		return n ? -errno : -EPIPE;
	do
		n = write(out, &byte, 1);
	while (n < 0 && errno == EINTR);
	return n == 1 ? 0 : -errno;
}

/* Another process that reads a byte, visits its own copy of the pages and writes a byte, until the other end of the pipe closes: its pid. */
int64_t pykvm_bench_peer(int in, int out, uint64_t address, uint64_t pages)
{
	pid_t pid = fork();

	if (pid)
		return pid < 0 ? -errno : pid;
	signal(SIGINT, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	if (dup2(in, 0) == 0 && dup2(out, 1) == 1) {
		close_range(3, ~0u, 0);
		touch(address, pages);
		while (!pass_on(0, 1))
			visit(address, pages);
	}
	_exit(0);
}

/* There and back, count times: two switches between address spaces each. */
int64_t pykvm_bench_switch(int in, int out, uint64_t address, uint64_t pages, uint64_t count)
{
	uint64_t start = __builtin_ia32_rdtsc();
	char byte = 0;
	int error;

	if (write(out, &byte, 1) != 1)
		return -errno;
	while (--count) {
		error = pass_on(in, out);
		if (error)
			return error;
		visit(address, pages);
	}
	while (read(in, &byte, 1) != 1)
		if (errno != EINTR)
			return -EPIPE;
	visit(address, pages);
	return (int64_t)(__builtin_ia32_rdtsc() - start);
}
