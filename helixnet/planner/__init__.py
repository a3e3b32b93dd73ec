"""Where layers go and how tokens flow: numbers in, plan out. `solve.solve` and `solve.evaluate` are the ways in.

Pure: no clock, no global random generator, no I/O; work is counted, so that the same seed gives the same plan.
This package itself imports nothing, because its rooms need numpy and HiGHS and are mostly used in a worker process.
"""
