"""The gdb remote serial protocol (GDB manual, appendix E): packets, the target's description, a session, where it listens."""
