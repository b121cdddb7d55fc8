"""What a measurement says of its host, read from a tree of files."""

from pykvm.bench.host import Noise, describe, sentence


def tree(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    return f"{root}/"


def test_a_vt_x_host(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/cpuinfo": "processor : 0\nmodel name\t: A CPU: fast\nmicrocode\t: 0x7\nflags : fpu vmx hypervisor\n\nprocessor : 1",
            "proc/cmdline": "root=/dev/sda secret=1 mitigations=off kvm.halt_poll_ns=0",
            "sys/module/kvm/parameters/halt_poll_ns": "200000",
            "sys/module/kvm/parameters/nx_huge_pages": "Y",
            "sys/module/kvm_intel/parameters/ept": "Y",
            "sys/module/kvm_intel/parameters/vmentry_l1d_flush": "cond",
            "sys/devices/system/cpu/vulnerabilities/l1tf": "Vulnerable",
        },
    )
    host = describe(root)
    assert host["cpu"] == "A CPU: fast" and host["microcode"] == "0x7" and host["hypervisor"]
    assert host["vendor_modules"] == ["kvm_intel"]
    assert (host["vmentry_l1d_flush"], host["nx_huge_pages"], host["halt_poll_ns"]) == ("cond", "Y", "200000")
    assert host["mitigations"] == {"l1tf": "Vulnerable"}
    assert host["kernel_options"] == ["mitigations=off", "kvm.halt_poll_ns=0"]  # nothing else of the command line


def test_nothing_can_be_read(tmp_path):
    host = describe(f"{tmp_path}/")
    assert (host["cpu"], host["vendor_modules"], host["mitigations"], host["halt_poll_ns"]) == ("", [], {}, None)


def test_noise_is_said():
    noise = Noise()
    noise.spins = [2.0, 2.05]
    told = noise.as_dict()
    assert told["spin_tsc"] == [2.0, 2.05] and told["involuntary_switches"] >= 0
    told.update(load=0.1, steal=0.0, quiet=True)
    assert sentence(told).startswith("the machine was quiet")
    noise.spins = [2.0, 3.0]
    assert not noise.as_dict()["quiet"]
    assert sentence(noise.as_dict()).startswith("the machine was NOT quiet")
