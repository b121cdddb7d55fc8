/* What a trace keeps of an exit beside its record, so that words can be made of it later: registers, the code around RIP, and what the kernel
 * says of it. See runloop.h. Guest memory is read where Python has said that it lies; what is not known there, or what this file cannot
 * keep, is for Python to look at before the guest goes on. */
#include "runloop.h"

#include <stddef.h>
#include <string.h>

#define PAGE 4096u

#define ACCESSED_AND_DIRTY 0x60u	/* of a page table entry: the CPU sets them as it goes */

/* Do the guest's page tables still lead where they did? */
int pykvm_leads_there(const struct pykvm_code_page *p)
{
	uint64_t now;
	uint32_t i;

	for (i = 0; i < p->entries; i++) {
		now = 0;
		if (p->entry[i])
			memcpy(&now, p->entry[i], p->entry_size == 4 ? 4 : 8);
		if ((now ^ p->value[i]) & ~(uint64_t)ACCESSED_AND_DIRTY)
			return 0;
	}
	return 1;
}

/* A page in a table of PYKVM_CODE_PAGES, or NULL; whoever fills one in (pykvm/debug/hostpages.py) takes the same place. */
const struct pykvm_code_page *pykvm_find_code(const struct pykvm_code_page *pages, const struct kvm_sregs *s, uint64_t page)
{
	const struct pykvm_code_page *p = &pages[page / PAGE % PYKVM_CODE_PAGES];

	if (!p->known || p->gva != page || p->cr3 != s->cr3 || p->cr0 != s->cr0 || p->cr4 != s->cr4 || p->efer != s->efer)
		return NULL;
	return pykvm_leads_there(p) ? p : NULL;
}

/* Copy the code around RIP of a moment that has its registers. Returns 0 when a page of it is not known. */
int pykvm_keep_code(const struct pykvm_moments *all, struct pykvm_moment *m)
{
	const int is_64_bit = m->sregs.cs.l && m->sregs.efer & 1 << 10;		/* EFER.LMA */
	uint64_t rip = is_64_bit ? m->regs.rip : (uint32_t)(m->sregs.cs.base + m->regs.rip), at = rip - PYKVM_CODE_BEFORE;
	const struct pykvm_code_page *p;
	uint32_t done = 0, n;

	m->code_gva = at;
	m->code_first = m->code_end = 0;
	if (rip < PYKVM_CODE_BEFORE) {	/* at the bottom there is less; what goes round at the top is not looked at */
		done = (uint32_t)(PYKVM_CODE_BEFORE - rip);
		m->code_first = done;
	}
	for (; done < PYKVM_CODE_SIZE; done += n) {
		n = PAGE - (uint32_t)((at + done) % PAGE);
		if (n > PYKVM_CODE_SIZE - done)
			n = PYKVM_CODE_SIZE - done;
		p = pykvm_find_code(all->pages, &m->sregs, (at + done) / PAGE * PAGE);
		if (!p)
			return 0;
		if (p->host)
			memcpy(m->code + done, p->host + (at + done) % PAGE, n);
		else if (done + n <= PYKVM_CODE_BEFORE)
			m->code_first = done + n;	/* a hole before it */
		else
			break;
		m->code_end = done + n;
	}
	return 1;
}

/* REP INS, OUTS, STOS, MOVS: memory decides which element an exit is about. */
static int is_rep(const struct pykvm_moment *m)
{
	const uint8_t *code = m->code + PYKVM_CODE_BEFORE;
	uint32_t i;

	for (i = 0; i < 5 && PYKVM_CODE_BEFORE + i < m->code_end; i++) {
		if (code[i] == 0xf2 || code[i] == 0xf3)
			return 1;
		if (code[i] != 0x66 && code[i] != 0x67 && code[i] != 0x26 && code[i] != 0x2e && code[i] != 0x36 && code[i] != 0x3e &&
		    code[i] != 0x64 && code[i] != 0x65)
			return 0;
	}
	return 0;
}

/* The moment of the ring's newest record, once. Returns 0 when Python has to look now. */
int pykvm_keep_moment(const struct pykvm_vcpu *v, const struct pykvm_ring *ring)
{
	const uint64_t both = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	struct pykvm_moments *all = ring->moments;
	const struct kvm_run *run = v->run;
	struct pykvm_moment *m;
	uint64_t size = 0;

	if (all->used == ring->used)
		return 1;
	m = &all->data[ring->used - 1];
	m->detail_size = 0;
	if (run->exit_reason != KVM_EXIT_IO && run->exit_reason != KVM_EXIT_MMIO) {
		memcpy(m->detail, &run->hw, PYKVM_DETAIL);
		m->detail_size = PYKVM_DETAIL;
	} else if (run->exit_reason == KVM_EXIT_IO && run->io.count > 1) {
		size = (uint64_t)run->io.size * run->io.count;
		if (size <= PYKVM_DETAIL && run->io.data_offset <= v->run_size - size) {
			memcpy(m->detail, (const uint8_t *)run + run->io.data_offset, size);
			m->detail_size = (uint32_t)size;
		}
	}
	if ((run->kvm_valid_regs & both) != both)
		return 0;
	m->regs = run->s.regs.regs;
	m->sregs = run->s.regs.sregs;
	if (size > PYKVM_DETAIL || !pykvm_keep_code(all, m) || is_rep(m))
		return 0;
	all->used = ring->used;
	return 1;
}
