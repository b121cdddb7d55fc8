"""Devices, one a file: uart16550, debugconsole (0xe9), debugexit (0xf4), post (0x80), rtc (0x70), reset (0xcf9, 0x64)."""
