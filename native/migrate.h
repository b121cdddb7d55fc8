/*
 * What live migration does for every page: find the dirty ones, tell zero pages from others, copy, sum.
 * No KVM and no policy in here; pykvm/state/ calls it.
 */
#ifndef PYKVM_MIGRATE_H
#define PYKVM_MIGRATE_H

#include <stdint.h>

/* One row of a page frame, as it travels (pykvm/state/pages.py): ``count`` pages from guest page number ``page``. */
struct pykvm_page_run {
	uint64_t page;
	uint32_t count;
	uint32_t kind; /* PYKVM_RUN_ZERO: all zero, PYKVM_RUN_DATA: their bytes follow */
};

#define PYKVM_RUN_ZERO 0
#define PYKVM_RUN_DATA 1

/* CRC-32C (Castagnoli; RFC 3720 appendix B.4) of ``size`` bytes, going on from ``crc``, which is 0 at the start. */
uint32_t pykvm_crc32c(uint32_t crc, const uint8_t *data, uint64_t size);

/*
 * Take dirty pages of one slot, from page *next on, as rows and a copy of their bytes: the guest may write while this reads, and what
 * is summed must be what is sent. ``bitmap`` has a bit for each of the slot's ``pages`` pages; ``base`` is the first one's guest page
 * number. ``pagemap``, where it is not NULL, has the entries of /proc/self/pagemap (proc(5)) from page *next on: anonymous memory that has
 * never been touched is zero, and to read it would cost a page fault. Ends when ``buffer`` holds ``room`` pages, when ``rows`` rows are used, after ``look`` dirty pages, or at the slot's end;
 * *next is where to go on. Returns the pages in ``buffer``; *used is the number of rows, *sum the CRC-32C of those pages, which is made
 * while they are in the nearest cache.
 */
int64_t pykvm_pack_pages(const uint8_t *memory, const uint64_t *bitmap, uint64_t pages, uint64_t base, const uint64_t *pagemap, uint64_t *next, uint64_t look,
			 uint8_t *buffer, uint64_t room, struct pykvm_page_run *run, uint32_t rows, uint32_t *used,
			 uint32_t *sum);

#endif
