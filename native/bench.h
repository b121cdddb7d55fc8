/* What the benchmarks compare with: the same work in plain C, nothing more than it needs. */
#ifndef PYKVM_BENCH_H
#define PYKVM_BENCH_H

#include "state.h"
#include <stdint.h>
#include <linux/kvm.h>

int64_t pykvm_bench_exits(int fd, struct kvm_run *run, uint16_t stop_port);
int64_t pykvm_bench_start(int kvm_fd, uint64_t run_size, const uint8_t *code, uint32_t size, uint64_t memory);
int64_t pykvm_bench_irq(int vm_fd, int fd, struct kvm_run *run, uint32_t gsi, uint16_t ask_port, uint16_t stop_port);

int64_t pykvm_bench_map(uint64_t size, int kind);
void pykvm_bench_unmap(uint64_t address, uint64_t size);
int64_t pykvm_bench_discard(uint64_t address, uint64_t size);
int64_t pykvm_bench_code(const uint8_t *code, uint32_t size);
void pykvm_bench_forget_code(uint64_t code);
int64_t pykvm_bench_call(uint64_t code, uint64_t a, uint64_t b, uint64_t c, uint64_t *result);
int64_t pykvm_bench_map_unmap(uint64_t address, uint64_t pages, uint64_t passes);
int64_t pykvm_bench_peer(int in, int out, uint64_t address, uint64_t pages);
int64_t pykvm_bench_switch(int in, int out, uint64_t address, uint64_t pages, uint64_t count);

int64_t pykvm_bench_traps(int fd, struct kvm_run *run, uint16_t stop_port, uint32_t limit, uint32_t only, uint32_t skip,
			  struct kvm_coalesced_mmio_ring *ring);
int64_t pykvm_bench_boundary(int fd, struct kvm_run *run, uint32_t count);
int64_t pykvm_bench_spin(uint32_t count);
int64_t pykvm_bench_cool(uint64_t hva, uint64_t size, uint64_t stride);
int64_t pykvm_bench_alive(int kvm_fd, uint64_t run_size, const uint8_t *code, uint32_t size, uint64_t memory, uint64_t *handles);
void pykvm_bench_gone(uint64_t run_size, uint64_t memory, const uint64_t *handles);

int pykvm_bench_traced(void);
int pykvm_bench_trace(int pid);
int64_t pykvm_bench_steps(int pid, uint32_t runs, uint64_t *at, uint32_t room);
int64_t pykvm_bench_copy(uint64_t source, uint64_t size, uint32_t piece);

int pykvm_bench_restore(int kvm_fd, const char *path, uint64_t size, const struct pykvm_reset_vcpu *c, struct kvm_cpuid2 *cpuid,
			uint64_t run_size, uint64_t *handles);
int pykvm_bench_fork(int kvm_fd, uint64_t ram, uint64_t size, int from, const struct pykvm_reset_vcpu *c, struct kvm_cpuid2 *cpuid,
		     uint64_t run_size, uint64_t *handles);
int64_t pykvm_bench_resets(struct pykvm_reset *r, uint32_t count);
int pykvm_bench_save(const char *path, const uint8_t *memory, uint64_t size, uint32_t *sums);

#endif
