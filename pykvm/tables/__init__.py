"""What a PC's firmware leaves in memory for the guest: ACPI tables (acpi.py, with AML from aml.py) and the MP table (mptable.py).

``Blob`` is a piece of memory with pointers that wait for its address: either the tables are placed before the guest starts (place.py),
or firmware does it, told by fw_cfg's linker script (linker.py).
"""
