"""A machine's state as data: saved, compared, written to files, restored, cloned in this process, put back, moved to another process."""
