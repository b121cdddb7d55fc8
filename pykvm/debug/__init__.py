"""Looking into guests: why one stopped (explain), which instruction made an exit (insn)."""
