"""x86: registers by their manuals' names, CPU modes, page tables."""
