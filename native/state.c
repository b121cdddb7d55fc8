/* See state.h. */
#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "migrate.h"

#define PAGE 4096u

static int is_zero(const uint8_t *page)
{
	uint64_t word[8];

	for (uint32_t at = 0; at < PAGE; at += sizeof(word)) {
		memcpy(word, page + at, sizeof(word));
		if (word[0] | word[1] | word[2] | word[3] | word[4] | word[5] | word[6] | word[7])
			return 0;
	}
	return 1;
}

/* --- memory that nobody has touched ------------------------------------------------------------------------------------- */

#define PAGES_A_CHUNK (PYKVM_CHUNK / PAGE)
#define PRESENT (1ull << 63)
#define SWAPPED (1ull << 62)
#define FILE_PAGE (1ull << 61)
#define PRESENT_OR_SWAPPED (PRESENT | SWAPPED)

/* Which pages of a chunk may be other than zero. To read one that nobody has touched would cost a page fault, and of a memfd a page too
 * (proc(5), pagemap; lseek(2), SEEK_DATA). */
struct touched {
	int pagemap;	/* -1: all pages count */
	int file;	/* what the memory is a private mapping of; -1: it is anonymous */
	uint64_t entries[PAGES_A_CHUNK];
};

static void begin_touched(struct touched *t, int file)
{
	t->pagemap = file == PYKVM_ALL ? -1 : open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	t->file = file;
}

/* Pages that the file has data for count too. */
static void add_file(struct touched *t, uint64_t start, uint64_t size)
{
	uint64_t at = start, end = start + size;

	for (uint64_t i = 0; i < size / PAGE; i++)
		if (t->entries[i] & PRESENT && t->entries[i] & FILE_PAGE)
			t->entries[i] = 0;
	while (at < end) {
		off_t data = lseek(t->file, (off_t)at, SEEK_DATA), hole;

		if (data < 0 && errno == ENXIO)
			return;
		hole = data < 0 ? -1 : lseek(t->file, data, SEEK_HOLE);
		if (hole < 0) {	/* this file does not tell */
			data = (off_t)at;
			hole = (off_t)end;
		}
		for (at = (uint64_t)data / PAGE * PAGE; at < end && at < (uint64_t)hole; at += PAGE)
			t->entries[(at - start) / PAGE] |= PRESENT;
		at = (uint64_t)hole;
	}
}

/* The chunk of ``size`` bytes at ``start`` of the memory. */
static void look_touched(struct touched *t, const uint8_t *memory, uint64_t start, uint64_t size)
{
	ssize_t want = (ssize_t)(size / PAGE * 8);

	if (t->pagemap < 0 || pread(t->pagemap, t->entries, (size_t)want, (off_t)((uintptr_t)(memory + start) / PAGE * 8)) != want)
		memset(t->entries, 0xff, sizeof(t->entries));
	else if (t->file >= 0)
		add_file(t, start, size);
}

static void end_touched(struct touched *t)
{
	if (t->pagemap >= 0)
		close(t->pagemap);
}

/* --- memory files -------------------------------------------------------------------------------------------------------- */

/* A chunk's checksum goes over its pages that are not zero, each with its number before it: 0 for a chunk of zeros. */
static uint32_t add_page(uint32_t sum, uint32_t number, const uint8_t *page)
{
	return pykvm_crc32c(pykvm_crc32c(sum, (const uint8_t *)&number, sizeof(number)), page, PAGE);
}

static int write_all(int fd, const uint8_t *data, uint64_t size, uint64_t at)
{
	while (size) {
		ssize_t done = pwrite(fd, data, size, (off_t)at);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done ? -errno : -EIO;
		data += done, size -= (uint64_t)done, at += (uint64_t)done;
	}
	return 0;
}

/* ``file``: what the memory is a private mapping of, PYKVM_ANONYMOUS, or PYKVM_ALL: read every page.
 * Write memory to fd, which is sparse: zero pages are left out. One checksum a chunk. Returns bytes written, or -errno. */
int64_t pykvm_save_pages(int fd, const uint8_t *memory, uint64_t size, uint32_t *sums, int file)
{
	struct touched touched;
	int64_t written = 0;

	begin_touched(&touched, file);
	for (uint64_t start = 0; start < size; start += PYKVM_CHUNK) {
		uint64_t end = size - start < PYKVM_CHUNK ? size : start + PYKVM_CHUNK, run = start, at;
		uint32_t sum = 0;
		int r = 0;

		look_touched(&touched, memory, start, end - start);
		for (at = start; at < end && !r; at += PAGE) {
			if (touched.entries[(at - start) / PAGE] & PRESENT_OR_SWAPPED && !is_zero(memory + at)) {
				sum = add_page(sum, (uint32_t)((at - start) / PAGE), memory + at);
				continue;
			}
			if (run < at)
				r = write_all(fd, memory + run, at - run, run);
			written += (int64_t)(at - run);
			run = at + PAGE;
		}
		if (!r && run < end) {
			r = write_all(fd, memory + run, end - run, run);
			written += (int64_t)(end - run);
		}
		if (r) {
			written = r;
			break;
		}
		sums[start / PYKVM_CHUNK] = sum;
	}
	end_touched(&touched);
	return written;
}

/* -1: the file has these checksums; else the number of the first chunk that has not, or -errno - 1. */
int64_t pykvm_check_pages(int fd, uint64_t size, const uint32_t *sums)
{
	uint8_t *chunk = malloc(PYKVM_CHUNK);
	int64_t bad = -1;

	if (!chunk)
		return -ENOMEM - 1;
	for (uint64_t start = 0; start < size && bad == -1; start += PYKVM_CHUNK) {
		uint64_t length = size - start < PYKVM_CHUNK ? size - start : PYKVM_CHUNK, have = 0;
		uint32_t sum = 0;

		while (have < length) {
			ssize_t done = pread(fd, chunk + have, length - have, (off_t)(start + have));

			if (done < 0 && errno == EINTR)
				continue;
			if (done <= 0) {
				bad = done ? -errno - 1 : (int64_t)(start / PYKVM_CHUNK);
				break;
			}
			have += (uint64_t)done;
		}
		for (uint64_t at = 0; at < length && bad == -1; at += PAGE)
			if (!is_zero(chunk + at))
				sum = add_page(sum, (uint32_t)(at / PAGE), chunk + at);
		if (bad == -1 && sum != sums[start / PYKVM_CHUNK])
			bad = (int64_t)(start / PYKVM_CHUNK);
	}
	free(chunk);
	return bad;
}

/* Both names change places at once. */
int pykvm_exchange(const char *a, const char *b)
{
	return syscall(SYS_renameat2, AT_FDCWD, a, AT_FDCWD, b, 2 /* RENAME_EXCHANGE */) ? -errno : 0;
}

/* --- copies -------------------------------------------------------------------------------------------------------------- */

/* Copy into memory that is zero; returns how many pages were not. */
uint64_t pykvm_copy_pages(uint8_t *to, const uint8_t *from, uint64_t size, int file)
{
	struct touched touched;
	uint64_t pages = 0;

	begin_touched(&touched, file);
	for (uint64_t at = 0; at < size; at += PAGE) {
		if (at % PYKVM_CHUNK == 0)
			look_touched(&touched, from, at, size - at < PYKVM_CHUNK ? size - at : PYKVM_CHUNK);
		if (!(touched.entries[at % PYKVM_CHUNK / PAGE] & PRESENT_OR_SWAPPED) || is_zero(from + at))
			continue;
		memcpy(to + at, from + at, PAGE);
		pages++;
	}
	end_touched(&touched);
	return pages;
}

/* The file's content in place of what is mapped there, copy-on-write. */
int pykvm_remap_private(uint64_t hva, uint64_t size, int fd)
{
	void *at = mmap((void *)(uintptr_t)hva, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, 0);

	return at == MAP_FAILED ? -errno : 0;
}

/* --- reset --------------------------------------------------------------------------------------------------------------- */

#define CR4_PGE (1ull << 7)

static int fail(struct pykvm_reset *r, const char *name)
{
	r->failed = name;
	return -errno;
}

/* KVM_RUN that enters no guest: KVM completes an access that waits, and takes registers from kvm_run. */
static int touch(struct pykvm_reset *r, struct pykvm_vcpu *v)
{
	int tries = 0;

	v->run->immediate_exit = 1;
	while (!ioctl(v->fd, KVM_RUN, 0) || errno == EAGAIN)	/* another access of the same instruction: nobody wants to know */
		if (++tries > 1 << 20) {
			errno = ELOOP;
			break;
		}
	v->run->immediate_exit = v->kicked != 0;
	return errno == EINTR ? 0 : fail(r, "KVM_RUN");
}

/* What the guest had asked of user space, and what it would have been told, is gone. */
static void forget_exit(struct pykvm_vcpu *v)
{
	v->last = PYKVM_ERROR;
	v->stashed = v->appended = 0;
	v->reply_size = 0;
	if (v->coalesced)
		v->coalesced->first = v->coalesced->last;
}

static int put_slot(struct pykvm_reset *r, struct pykvm_reset_slot *s, int *stale)
{
	uint64_t words = (s->region.memory_size / PAGE + 63) / 64;
	struct kvm_dirty_log log = { .slot = s->region.slot };

	log.dirty_bitmap = s->dirty;
	if (ioctl(r->vm_fd, KVM_GET_DIRTY_LOG, &log))
		return fail(r, "KVM_GET_DIRTY_LOG");
	for (uint64_t w = 0; w < words; w++) {
		uint64_t bits = s->dirty[w] | s->host[w];

		if (!bits)
			continue;
		s->host[w] = 0;
		for (; bits; bits &= bits - 1) {
			uint64_t at = (w * 64 + (uint64_t)__builtin_ctzll(bits)) * PAGE, gpa = s->region.guest_phys_addr + at;

			if (gpa >= r->guarded && gpa < r->guarded_end)
				*stale = 1;
			memcpy((uint8_t *)(uintptr_t)s->region.userspace_addr + at, s->base + at, PAGE);
			r->pages++;
		}
	}
	return 0;
}

#define SET(fd, name, argument)			\
	do {					\
		if (ioctl(fd, name, argument) < 0)	\
			return fail(r, #name);	\
	} while (0)

/* Shadows go, all of them, when a slot goes, whichever it is; a TLB when paging changes: CR4.PGE, as long as nobody runs. */
static int forget_tables(struct pykvm_reset *r)
{
	struct kvm_userspace_memory_region gone = r->spare;

	r->flushes++;
	if (r->shadows) {
		gone.memory_size = 0;
		SET(r->vm_fd, KVM_SET_USER_MEMORY_REGION, &r->spare);
		SET(r->vm_fd, KVM_SET_USER_MEMORY_REGION, &gone);
		return 0;
	}
	for (uint32_t i = 0; i < r->vcpus; i++) {
		struct kvm_sregs other = r->vcpu[i].sregs;

		other.cr4 ^= CR4_PGE;
		SET(r->vcpu[i].v->fd, KVM_SET_SREGS, &other);
	}
	return 0;
}

static int put_vcpu(struct pykvm_reset *r, struct pykvm_reset_vcpu *c)
{
	struct kvm_run *run = c->v->run;
	int fd = c->v->fd;

	run->cr8 = c->sregs.cr8;
	if (r->syncs) {
		run->s.regs.regs = c->regs;
		run->s.regs.sregs = c->sregs;
		run->s.regs.events = c->events;
		run->kvm_dirty_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
		if (touch(r, c->v))
			return -errno;
	} else {
		SET(fd, KVM_SET_SREGS, &c->sregs);
		SET(fd, KVM_SET_REGS, &c->regs);
	}
	if (c->has_xcrs)
		SET(fd, KVM_SET_XCRS, &c->xcrs);
	if (c->xsave)
		SET(fd, KVM_SET_XSAVE, c->xsave);
	if (c->has_debugregs)
		SET(fd, KVM_SET_DEBUGREGS, &c->debugregs);
	if (c->lapic)
		SET(fd, KVM_SET_LAPIC, c->lapic);
	if (c->msrs) {
		int done = ioctl(fd, KVM_SET_MSRS, c->msrs);

		if (done != (int)c->msrs->nmsrs) {
			errno = done < 0 ? errno : EINVAL;
			return fail(r, "KVM_SET_MSRS");
		}
	}
	if (c->lapic)
		SET(fd, KVM_SET_MP_STATE, &c->mp_state);
	if (!r->syncs)
		SET(fd, KVM_SET_VCPU_EVENTS, &c->events);
	run->ready_for_interrupt_injection = 0;
	return 0;
}

/* All back to where it was. No vCPU may be in a run. Returns 0, or -errno with the ioctl's name in failed. */
int pykvm_reset(struct pykvm_reset *r)
{
	int stale = 0, error;

	r->pages = 0;
	for (uint32_t i = 0; i < r->vcpus; i++) {
		if ((error = touch(r, r->vcpu[i].v)))
			return error;
		forget_exit(r->vcpu[i].v);
	}
	for (uint32_t i = 0; i < r->slots; i++)
		if ((error = put_slot(r, &r->slot[i], &stale)))
			return error;
	if (stale && (error = forget_tables(r)))
		return error;
	for (uint32_t i = 0; i < r->vcpus; i++)
		if ((error = put_vcpu(r, &r->vcpu[i])))
			return error;
	for (uint32_t i = 0; i < r->irqchips; i++)
		SET(r->vm_fd, KVM_SET_IRQCHIP, &r->irqchip[i]);
	if (r->pit)
		SET(r->vm_fd, KVM_SET_PIT2, r->pit);
	return 0;
}
