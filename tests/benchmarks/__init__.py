"""Benchmarks beside the peers: ``make bench``. Never part of the tests, which time nothing."""

import os

for _name in (
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
):  # before NumPy is there: peers deserve the processor's own kernels
    os.environ.pop(_name, None)
