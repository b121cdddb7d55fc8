"""Finishes instructions that KVM's emulator gives up on (KVM_EXIT_INTERNAL_ERROR, suberror 1), where user space can do it exactly.

KVM emulates what it cannot have the CPU execute: real mode without unrestricted guest, instructions that touch MMIO and, on a host without
hardware virtualization, all CPL0 code. What its emulator does not know ends here: decoded by capstone, carried out on the vCPU's
registers, its XSAVE area and memory through the guest's page tables. One file for each group of instructions; docs/assist.md tells
what is done, and what is not.
"""

from pykvm.x86.assist.finish import Assist

__all__ = ["Assist"]
