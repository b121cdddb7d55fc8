"""Benchmarks: each row beside a plain C loop that does the same work in the same run, paired and interleaved."""
