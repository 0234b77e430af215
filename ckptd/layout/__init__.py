"""The layout algebra: which box of which logical tensor lives where.  Pure: no I/O, no torch."""
