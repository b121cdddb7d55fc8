"""Emulated KVM hosts: VT-x with EPT in Bochs, AMD-V with NPT in QEMU's TCG, for machines that have neither.

>>> with pykvm.hosts.boot("intel") as host:
...     host.run(["pykvm", "run", "hello"]).stdout
'Hello from long mode.\\n'

debian.py gets the kernel, image.py makes a root file system from the running interpreter, emulators.py knows QEMU and Bochs, wire.py
is the framed protocol on the second serial port, agent.py its guest side, session.py a booted host.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.hosts.emulators import Model as Model
    from pykvm.hosts.session import Completed as Completed
    from pykvm.hosts.session import Host as Host
    from pykvm.hosts.session import boot as boot

__all__ = ["Completed", "Host", "Model", "boot"]


def __getattr__(name: str) -> object:
    if name in ("boot", "Host", "Completed"):
        from pykvm.hosts import session

        return getattr(session, name)
    if name == "Model":
        from pykvm.hosts.emulators import Model

        return Model
    raise AttributeError(f"module 'pykvm.hosts' has no attribute {name!r}")
