/* What the benchmarks compare with: the same work in plain C, nothing more than it needs. */
#ifndef PYKVM_BENCH_H
#define PYKVM_BENCH_H

#include <stdint.h>
#include <linux/kvm.h>

int64_t pykvm_bench_exits(int fd, struct kvm_run *run, uint16_t stop_port);
int64_t pykvm_bench_start(int kvm_fd, uint64_t run_size, const uint8_t *code, uint32_t size, uint64_t memory);

#endif
