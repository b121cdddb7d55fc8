/* See migrate.h. */
#include "migrate.h"

#include <string.h>

#define PAGE 4096
#define PRESENT_OR_SWAPPED (3ull << 62) /* of a pagemap entry */

/* --- CRC-32C: the CPU's own instruction where there is one (SSE4.2), else four tables ---------------------------------- */

#define POLYNOMIAL 0x82F63B78u /* 0x1EDC6F41, bits reversed */

static uint32_t table[4][256];

__attribute__((constructor)) static void make_tables(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
		table[0][i] = crc;
	}
	for (uint32_t i = 0; i < 256; i++)
		for (int t = 1; t < 4; t++)
			table[t][i] = table[t - 1][i] >> 8 ^ table[0][table[t - 1][i] & 255];
}

static uint32_t crc_by_table(uint32_t crc, const uint8_t *data, uint64_t size)
{
	while (size >= 4) {
		uint32_t word;

		memcpy(&word, data, 4);
		crc ^= word;
		crc = table[3][crc & 255] ^ table[2][crc >> 8 & 255] ^ table[1][crc >> 16 & 255] ^ table[0][crc >> 24];
		data += 4, size -= 4;
	}
	while (size--)
		crc = crc >> 8 ^ table[0][(crc ^ *data++) & 255];
	return crc;
}

__attribute__((target("sse4.2"))) static uint32_t crc_by_instruction(uint32_t crc, const uint8_t *data, uint64_t size)
{
	uint64_t wide = crc;

	while (size >= 8) {
		uint64_t word;

		memcpy(&word, data, 8);
		wide = __builtin_ia32_crc32di(wide, word);
		data += 8, size -= 8;
	}
	crc = (uint32_t)wide;
	while (size--)
		crc = __builtin_ia32_crc32qi(crc, *data++);
	return crc;
}

uint32_t pykvm_crc32c(uint32_t crc, const uint8_t *data, uint64_t size)
{
	return ~(__builtin_cpu_supports("sse4.2") ? crc_by_instruction : crc_by_table)(~crc, data, size);
}

/* --- pages ------------------------------------------------------------------------------------------------------------- */

static int is_zero(const uint8_t *page)
{
	uint64_t word[8];

	for (int at = 0; at < PAGE; at += sizeof(word)) {
		memcpy(word, page + at, sizeof(word));
		if (word[0] | word[1] | word[2] | word[3] | word[4] | word[5] | word[6] | word[7])
			return 0;
	}
	return 1;
}

/* The first dirty page from ``page`` on, or ``pages``. */
static uint64_t next_dirty(const uint64_t *bitmap, uint64_t page, uint64_t pages)
{
	while (page < pages) {
		uint64_t word = bitmap[page / 64] >> page % 64;

		if (word) {
			page += __builtin_ctzll(word);
			return page < pages ? page : pages;
		}
		page = (page / 64 + 1) * 64;
	}
	return pages;
}

int64_t pykvm_pack_pages(const uint8_t *memory, const uint64_t *bitmap, uint64_t pages, uint64_t base, const uint64_t *pagemap, uint64_t *next, uint64_t look,
			 uint8_t *buffer, uint64_t room, struct pykvm_page_run *run, uint32_t rows, uint32_t *used,
			 uint32_t *sum)
{
	uint64_t first = *next, page = next_dirty(bitmap, first, pages), packed = 0;
	uint32_t n = 0;

	*sum = 0;
	while (page < pages && packed < room && look--) {
		uint8_t *copy = buffer + packed * PAGE;
		uint32_t kind;

		kind = PYKVM_RUN_ZERO;
		if (!pagemap || pagemap[page - first] & PRESENT_OR_SWAPPED) {
			memcpy(copy, memory + page * PAGE, PAGE);
			kind = is_zero(copy) ? PYKVM_RUN_ZERO : PYKVM_RUN_DATA;
		}
		if (n && run[n - 1].kind == kind && run[n - 1].page + run[n - 1].count == base + page) {
			run[n - 1].count++;
		} else {
			if (n == rows)
				break;
			run[n++] = (struct pykvm_page_run){ base + page, 1, kind };
		}
		if (kind == PYKVM_RUN_DATA) {
			*sum = pykvm_crc32c(*sum, copy, PAGE);
			packed++;
		}
		page = next_dirty(bitmap, page + 1, pages);
	}
	*next = page;
	*used = n;
	return (int64_t)packed;
}
