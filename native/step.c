/* Many single steps in one call: KVM_RUN under KVM_GUESTDBG_SINGLESTEP, which the caller has asked KVM for, as long as nothing has to be looked
 * at. See runloop.h. Only plain instructions are stepped here: those that leave segments, control registers, the trap flag and ports alone, so
 * that a step is a step on every host and the mode of the first is that of all. The others are for Python (pykvm/debug/stepping.py). */
#include "runloop.h"

#include <string.h>

#define PAGE 4096u
#define LONGEST 15u	/* bytes of an instruction */

/* A bit for each opcode that is plain. Without: far transfers, INT, IRET, PUSHF, POPF, segment registers, I/O, HLT, CLI, STI, escapes and
 * prefixes, which are looked at apart, and what is no instruction in 64-bit code. */
static const uint8_t plain_one[32] = {
	0x3f, 0x3f, 0x3f, 0x3f,		/* 00-1f: ADD OR ADC SBB, but PUSH and POP of segments */
	0xbf, 0xbf, 0xbf, 0xbf,		/* 20-3f: AND SUB XOR CMP DAA ..., but prefixes */
	0xff, 0xff, 0xff, 0xff,		/* 40-5f: INC DEC (prefixes in 64-bit code) PUSH POP */
	0x0b, 0x0f, 0xff, 0xff,		/* 60-7f: PUSHA POPA MOVSXD, PUSH IMUL, Jcc */
	0xff, 0xbf, 0xff, 0xcb,		/* 80-9f: ALU TEST XCHG MOV LEA POP, but MOV to a segment; XCHG CBW CWD WAIT SAHF LAHF */
	0xff, 0xff, 0xff, 0xff,		/* a0-bf: MOV, strings, MOV */
	0xcf, 0x03, 0x9f, 0xff,		/* c0-df: shifts RET MOV ENTER LEAVE, but LES LDS (VEX); x87 */
	0x0f, 0x0b, 0xe0, 0xf3,		/* e0-ff: LOOP JCXZ CALL JMP; CMC TEST..., CLC STC CLD STD INC DEC CALL JMP PUSH */
};

static const uint8_t plain_two[32] = {	/* after 0f */
	0x00, 0x00, 0xff, 0x81,		/* 00-1f: SSE moves, NOP */
	0x00, 0xff, 0x00, 0x00,		/* 20-3f: SSE, but control and debug registers, MSRs */
	0xff, 0xff, 0xff, 0xff,		/* 40-5f: CMOVcc, SSE */
	0xff, 0xff, 0xff, 0xfc,		/* 60-7f: SSE, but VMREAD VMWRITE */
	0xff, 0xff, 0xff, 0xff,		/* 80-9f: Jcc SETcc */
	0x38, 0xb8, 0xcb, 0xfc,		/* a0-bf: BT SHLD BTS SHRD IMUL CMPXCHG MOVZX BTR MOVZX, BTx BSF BSR MOVSX */
	0x7f, 0xff, 0xff, 0xff,		/* c0-df: XADD, SSE, BSWAP */
	0xff, 0xff, 0xff, 0x7f,		/* e0-ff: SSE */
};

/* Is it a plain instruction? size: bytes that are there; an instruction that they may not hold is none. */
int pykvm_is_plain(const uint8_t *code, uint32_t size, int is_64_bit)
{
	uint32_t i;

	if (size < LONGEST)
		return 0;
	for (i = 0; i < 4; i++) {
		if (code[i] != 0x66 && code[i] != 0x67 && code[i] != 0xf2 && code[i] != 0xf3 && code[i] != 0x26 && code[i] != 0x2e &&
		    code[i] != 0x36 && code[i] != 0x3e && code[i] != 0x64 && code[i] != 0x65 && code[i] != 0xf0)
			break;
	}
	if (is_64_bit && (code[i] & 0xf0) == 0x40 && (code[++i] & 0xf0) == 0x40)
		return 0;	/* one REX prefix after another */
	if (code[i] == 0x0f)
		return plain_two[code[i + 1] / 8] >> code[i + 1] % 8 & 1;
	if (code[i] == 0xff && (code[i + 1] >> 3 & 7) != 0 && (code[i + 1] >> 3 & 7) != 1 && (code[i + 1] >> 3 & 7) != 2 &&
	    (code[i + 1] >> 3 & 7) != 4 && (code[i + 1] >> 3 & 7) != 6)
		return 0;	/* far CALL and JMP */
	return plain_one[code[i] / 8] >> code[i] % 8 & 1;
}

/* Is a breakpoint of the caller's planted where this instruction may lie? */
static int is_near(const struct pykvm_steps *s, uint64_t rip)
{
	uint32_t low = 0, high = s->planted_count, middle;

	while (low < high) {
		middle = (low + high) / 2;
		if (s->planted[middle] < rip)
			low = middle + 1;
		else
			high = middle;
	}
	return low < s->planted_count && s->planted[low] - rip < LONGEST;
}

static int is_stop(const struct pykvm_steps *s, uint64_t rip)
{
	uint32_t i;

	for (i = 0; i < s->stop_count; i++)
		if (s->stops[i] == rip)
			return 1;
	return 0;
}

static int has_changed(const struct pykvm_steps *s)
{
	const struct pykvm_watch *w;

	for (w = s->watches; w < s->watches + s->watch_count; w++) {
		if (!pykvm_leads_there(&w->page))
			return 1;
		if (w->page.host && memcmp(w->page.host + w->offset, w->before, w->size))
			return 1;
	}
	return 0;
}

/* Why the instruction at s->rip is none to be stepped here, or 0. */
static uint32_t why_not(const struct pykvm_steps *s)
{
	const struct pykvm_code_page *p = pykvm_find_code(s->code, &s->sregs, s->rip / PAGE * PAGE);
	uint32_t offset = (uint32_t)(s->rip % PAGE);

	if (!p)
		return PYKVM_STEP_PAGE;
	if (!p->host || !pykvm_is_plain(p->host + offset, PAGE - offset, (int)s->is_64_bit) || is_near(s, s->rip))
		return PYKVM_STEP_HARD;
	return 0;
}

/* Step until s->why. s->rip and s->done are where it stands then, and after how many instructions. Returns what pykvm_begin() does. */
int pykvm_steps(struct pykvm_vcpu *v, struct pykvm_steps *s, uint64_t first_ns, uint64_t interval_ns)
{
	const struct kvm_run *run = v->run;
	int r = pykvm_begin(v, first_ns, interval_ns);

	if (r < 0)
		return r;
	s->done = 0;
	for (;;) {
		s->why = why_not(s);
		if (s->why)
			break;
		pykvm_once(v);
		if ((v->last & 15) != PYKVM_LOOK || run->exit_reason != KVM_EXIT_DEBUG || run->debug.arch.exception != 1) {
			s->why = PYKVM_STEP_EXIT;
			break;
		}
		s->rip = run->debug.arch.pc;
		s->done++;
		if (s->done >= s->count || s->rip - s->first >= s->size || is_stop(s, s->rip) || has_changed(s)) {
			s->why = PYKVM_STEP_DONE;
			break;
		}
	}
	pykvm_end(v);
	return 0;
}
