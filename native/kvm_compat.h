/* <linux/kvm.h>, plus what headers older than the running kernel lack, plus names for what the kernel left unnamed.
 *
 * The first part is guarded symbol by symbol, so that this compiles with Debian 12's 6.1 headers and with newer ones.
 * The second part names the members of the union in struct kvm_run: cffi checks the layout of named types only.
 */
#ifndef PYKVM_KVM_COMPAT_H
#define PYKVM_KVM_COMPAT_H

#include <stddef.h>
#include <linux/kvm.h>

/* --- newer than 6.1 ------------------------------------------------------------------------------------------------ */

#ifndef KVM_MEM_GUEST_MEMFD
#define KVM_MEM_GUEST_MEMFD (1UL << 2)
struct kvm_userspace_memory_region2 {
	__u32 slot, flags;
	__u64 guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
	__u32 guest_memfd, pad1;
	__u64 pad2[14];
};
#endif
#ifndef KVM_SET_USER_MEMORY_REGION2
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#endif
#ifndef KVM_CREATE_GUEST_MEMFD
struct kvm_create_guest_memfd {
	__u64 size, flags, reserved[6];
};
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
#endif
#ifndef KVM_MEMORY_ATTRIBUTE_PRIVATE
#define KVM_MEMORY_ATTRIBUTE_PRIVATE (1ULL << 3)
#endif
#ifndef KVM_SET_MEMORY_ATTRIBUTES
struct kvm_memory_attributes {
	__u64 address, size, attributes, flags;
};
#define KVM_SET_MEMORY_ATTRIBUTES _IOW(KVMIO, 0xd2, struct kvm_memory_attributes)
#endif
#ifndef KVM_PRE_FAULT_MEMORY
struct kvm_pre_fault_memory {
	__u64 gpa, size, flags, padding[5];
};
#define KVM_PRE_FAULT_MEMORY _IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)
#endif
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
#ifndef KVM_EXIT_TDX
#define KVM_EXIT_TDX 40
#endif
#ifndef KVM_EXIT_SNP_REQ_CERTS
#define KVM_EXIT_SNP_REQ_CERTS 43
#endif
#ifndef KVM_MEMORY_EXIT_FLAG_PRIVATE
#define KVM_MEMORY_EXIT_FLAG_PRIVATE (1ULL << 3)
#endif
#ifndef KVM_CAP_USER_MEMORY2
#define KVM_CAP_USER_MEMORY2 231
#endif
#ifndef KVM_CAP_MEMORY_FAULT_INFO
#define KVM_CAP_MEMORY_FAULT_INFO 232
#endif
#ifndef KVM_CAP_MEMORY_ATTRIBUTES
#define KVM_CAP_MEMORY_ATTRIBUTES 233
#endif
#ifndef KVM_CAP_GUEST_MEMFD
#define KVM_CAP_GUEST_MEMFD 234
#endif
#ifndef KVM_CAP_VM_TYPES
#define KVM_CAP_VM_TYPES 235
#endif
#ifndef KVM_CAP_PRE_FAULT_MEMORY
#define KVM_CAP_PRE_FAULT_MEMORY 236
#endif
#ifndef KVM_CAP_X86_APIC_BUS_CYCLES_NS
#define KVM_CAP_X86_APIC_BUS_CYCLES_NS 237
#endif
#ifndef KVM_CAP_X86_GUEST_MODE
#define KVM_CAP_X86_GUEST_MODE 238
#endif
#ifndef KVM_CAP_GUEST_MEMFD_FLAGS
#define KVM_CAP_GUEST_MEMFD_FLAGS 244
#endif
#ifndef GUEST_MEMFD_FLAG_MMAP
#define GUEST_MEMFD_FLAG_MMAP (1ULL << 0)
#endif
#ifndef GUEST_MEMFD_FLAG_INIT_SHARED
#define GUEST_MEMFD_FLAG_INIT_SHARED (1ULL << 1)
#endif
#ifndef KVM_X86_DEFAULT_VM
#define KVM_X86_DEFAULT_VM 0
#endif
#ifndef KVM_X86_SW_PROTECTED_VM
#define KVM_X86_SW_PROTECTED_VM 1
#endif

/* --- names for the members of kvm_run's union ---------------------------------------------------------------------- */

#define PYKVM_NAME_EXIT(member) typedef __typeof__(((struct kvm_run *)0)->member) kvm_exit_##member
PYKVM_NAME_EXIT(hw);
PYKVM_NAME_EXIT(fail_entry);
PYKVM_NAME_EXIT(ex);
PYKVM_NAME_EXIT(io);
PYKVM_NAME_EXIT(debug);
PYKVM_NAME_EXIT(mmio);
PYKVM_NAME_EXIT(hypercall);
PYKVM_NAME_EXIT(tpr_access);
PYKVM_NAME_EXIT(internal);
PYKVM_NAME_EXIT(emulation_failure);
PYKVM_NAME_EXIT(system_event);
PYKVM_NAME_EXIT(eoi);
PYKVM_NAME_EXIT(msr);
PYKVM_NAME_EXIT(notify);
typedef __typeof__(((struct kvm_run *)0)->s) kvm_run_sync;
typedef __typeof__(((struct kvm_hyperv_exit *)0)->u) kvm_hyperv_choice;
typedef __typeof__(((struct kvm_hyperv_exit *)0)->u.synic) kvm_hyperv_synic;
typedef __typeof__(((struct kvm_hyperv_exit *)0)->u.hcall) kvm_hyperv_hcall;
typedef __typeof__(((struct kvm_hyperv_exit *)0)->u.syndbg) kvm_hyperv_syndbg;
typedef __typeof__(((struct kvm_xen_exit *)0)->u) kvm_xen_choice;
typedef __typeof__(((struct kvm_xen_exit *)0)->u.hcall) kvm_xen_hcall;
typedef __typeof__(((struct kvm_vcpu_events *)0)->exception) kvm_events_exception;
typedef __typeof__(((struct kvm_vcpu_events *)0)->interrupt) kvm_events_interrupt;
typedef __typeof__(((struct kvm_vcpu_events *)0)->nmi) kvm_events_nmi;
typedef __typeof__(((struct kvm_vcpu_events *)0)->smi) kvm_events_smi;
typedef __typeof__(((struct kvm_vcpu_events *)0)->triple_fault) kvm_events_triple_fault;
typedef __typeof__(((struct kvm_irqchip *)0)->chip) kvm_irqchip_chip;
typedef __typeof__(((struct kvm_irq_routing_entry *)0)->u) kvm_irq_routing_choice;
typedef __typeof__(((struct kvm_nested_state *)0)->hdr) kvm_nested_header;

/* The union has these members only in headers newer than 6.7, 6.15 and 6.18; their place is the same as hw's. */
typedef struct {
	__u64 flags, gpa, size;
} kvm_exit_memory_fault;
typedef struct {
	__u64 flags, nr, ret, data[5];
} kvm_exit_tdx;
typedef struct {
	__u64 gpa, npages, ret;
} kvm_exit_snp_certs;

static inline kvm_exit_memory_fault *pykvm_memory_fault(struct kvm_run *run)
{
	return (kvm_exit_memory_fault *)&run->hw;
}

static inline kvm_exit_tdx *pykvm_tdx(struct kvm_run *run)
{
	return (kvm_exit_tdx *)&run->hw;
}

static inline kvm_exit_snp_certs *pykvm_snp_certs(struct kvm_run *run)
{
	return (kvm_exit_snp_certs *)&run->hw;
}

#endif
