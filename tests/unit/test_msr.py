"""MSR names and numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.errors import ConfigError
from pykvm.x86.msr import MSRS, msr_name, msr_number


@pytest.mark.parametrize(
    ("name", "number"),
    [  # SDM vol. 4 table 2-2, APM vol. 2 appendix A, the kernel's kvm_para.h
        ("IA32_TSC", 0x10), ("IA32_APIC_BASE", 0x1B), ("IA32_PMC7", 0xC8), ("IA32_SYSENTER_EIP", 0x176), ("IA32_MISC_ENABLE", 0x1A0),
        ("IA32_MTRR_PHYSMASK9", 0x213), ("IA32_MTRR_FIX4K_F8000", 0x26F), ("IA32_PAT", 0x277), ("IA32_MC3_STATUS", 0x40D),
        ("IA32_VMX_BASIC", 0x480), ("IA32_VMX_VMFUNC", 0x491), ("IA32_TSC_DEADLINE", 0x6E0), ("IA32_X2APIC_ICR", 0x830),
        ("IA32_X2APIC_IRR7", 0x827), ("IA32_XSS", 0xDA0), ("MSR_KVM_SYSTEM_TIME_NEW", 0x4B564D01), ("MSR_KVM_STEAL_TIME", 0x4B564D03),
        ("IA32_EFER", 0xC0000080), ("IA32_KERNEL_GS_BASE", 0xC0000102), ("PERF_CTR5", 0xC001020B), ("VM_HSAVE_PA", 0xC0010117),
        ("DE_CFG", 0xC0011029),
    ],
)  # fmt: skip
def test_numbers(name, number):
    assert msr_number(name) == number
    assert msr_name(number) == name


def test_each_number_has_one_name():
    assert len(set(MSRS.values())) == len(MSRS) > 100


@given(st.sampled_from(sorted(MSRS)))
def test_there_and_back(name):
    assert msr_name(msr_number(name)) == name
    assert msr_number(name.lower()) == MSRS[name]


@given(st.integers(0, 2**32 - 1))
def test_numbers_are_names_too(number):
    assert msr_number(hex(number)) == msr_number(str(number)) == number
    assert msr_number(msr_name(number)) == number


@pytest.mark.parametrize(
    ("name", "number"), [("EFER", 0xC0000080), ("MSR_IA32_TSC", 0x10), ("msr_lstar", 0xC0000082), (" SFMASK ", 0xC0000084)]
)
def test_other_spellings(name, number):
    assert msr_number(name) == number


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("IA32_TCS", "unknown MSR 'IA32_TCS'; did you mean IA32_TSC?"),
        ("", "give its number"),
        ("0x1ffffffff", "numbers have 32 bits"),
        ("12ab", "neither a name nor a number"),
        ("-1", "unknown MSR"),
    ],
)
def test_what_is_no_msr(name, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        msr_number(name)
