"""Benchmarks: every op against its rivals and the machine's copy bandwidth, behind a correctness gate."""
