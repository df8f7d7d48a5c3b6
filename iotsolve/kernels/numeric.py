"""Exponentials and logarithms that vectorise, for use inside compiled kernels; base 2, relative error near rounding.

A range reduction by the exponent's bits and a polynomial: what a compiler cannot do to the C library's functions. Arguments
of ``-inf`` give exactly 0 (a forbidden arc), as does what would be denormal, on which a processor takes ten times as long. NaN
passes through exponentials of base e, but not through those of base 2, whose callers check their vectors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import event
from numba.extending import intrinsic

__all__ = ["FAST", "LOG2E", "NORMAL", "compiled", "exp2_double", "exp2_single", "exp_double", "exp_single", "log_double"]

LOG2E = math.log2(math.e)
NORMAL = 2.3e-308  # the least number of full precision, about

FAST = {"reassoc", "contract", "nsz", "arcp"}  # never nnan or ninf: an infinite cost must stay one


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when first called, and cached on disk where there is a place to write."""
    options = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no directory for its cache
        return njit(**options)(function)


class _Notice(event.Listener):
    """Says once, to a person who waits, what for."""

    said = False

    def on_start(self, begun: event.Event) -> None:
        ours = begun.data["dispatcher"].py_func.__module__.startswith("iotsolve.")
        if ours and not self.said and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            self.said = True
            print("iotsolve compiles its kernels for this machine: a few seconds up to half a minute, once.", file=sys.stderr)

    def on_end(self, ended: event.Event) -> None:
        pass


event.register("numba:compile", _Notice())


@intrinsic
def _single_of_bits(context, bits):
    return types.float32(types.int32), lambda c, builder, s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _double_of_bits(context, bits):
    return types.float64(types.int64), lambda c, builder, s, args: builder.bitcast(args[0], ir.DoubleType())


@intrinsic
def _bits_of_double(context, x):
    return types.int64(types.float64), lambda c, builder, s, args: builder.bitcast(args[0], ir.IntType(64))


_E = [math.log(2.0) ** k / math.factorial(k) for k in range(13)]  # of 2^r
_E1, _E2, _E3, _E4, _E5, _E6, _E7, _E8, _E9, _E10, _E11, _E12 = _E[1:]
_S1, _S2, _S3, _S4, _S5, _S6, _S7 = (np.float32(x) for x in _E[1:8])
_LN2 = math.log(2.0)
_SQRT2 = math.sqrt(2.0)


@njit(inline="always")
def exp2_single(x):
    """``2^x`` in float32 of an exponent in float64; 0 below ``2^-126``."""
    x = x if x > -127.0 else -127.0
    x = x if x < 127.0 else 127.0
    k = math.floor(x + 0.5)
    r = np.float32(x - k)
    p = _S6 + _S7 * r
    p = _S5 + p * r
    p = _S4 + p * r
    p = _S3 + p * r
    p = _S2 + p * r
    p = _S1 + p * r
    p = np.float32(1.0) + p * r
    return p * _single_of_bits((np.int32(k) + np.int32(127)) << np.int32(23))


@njit(inline="always")
def exp2_double(x):
    """``2^x`` in float64; 0 below ``2^-1022``."""
    x = x if x > -1023.0 else -1023.0
    x = x if x < 1023.0 else 1023.0
    k = math.floor(x + 0.5)
    r = x - k
    p = _E11 + _E12 * r
    p = _E10 + p * r
    p = _E9 + p * r
    p = _E8 + p * r
    p = _E7 + p * r
    p = _E6 + p * r
    p = _E5 + p * r
    p = _E4 + p * r
    p = _E3 + p * r
    p = _E2 + p * r
    p = _E1 + p * r
    p = 1.0 + p * r
    return p * _double_of_bits((np.int64(k) + np.int64(1023)) << np.int64(52))


@njit(inline="always")
def log_double(x):
    """Natural logarithm of a positive normal number."""
    bits = _bits_of_double(x)
    k = ((bits >> np.int64(52)) & np.int64(0x7FF)) - np.int64(1023)
    m = _double_of_bits((bits & np.int64(0x000FFFFFFFFFFFFF)) | np.int64(0x3FF0000000000000))
    large = m > _SQRT2
    m = 0.5 * m if large else m
    e = np.float64(k) + (1.0 if large else 0.0)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = 1.0 / 19.0 + z / 21.0
    p = 1.0 / 17.0 + p * z
    p = 1.0 / 15.0 + p * z
    p = 1.0 / 13.0 + p * z
    p = 1.0 / 11.0 + p * z
    p = 1.0 / 9.0 + p * z
    p = 1.0 / 7.0 + p * z
    p = 1.0 / 5.0 + p * z
    p = 1.0 / 3.0 + p * z
    p = 1.0 + p * z
    return e * _LN2 + 2.0 * s * p


# of base e: the exponent less so many logarithms of 2, in two parts of which the first has few bits; no reassociation may undo it
_F1, _F2, _F3, _F4, _F5, _F6, _F7 = (np.float32(1.0 / math.factorial(k)) for k in range(1, 8))
_HIGH_SINGLE, _LOW_SINGLE = np.float32(0.693359375), np.float32(_LN2 - 0.693359375)
_LOG2E_SINGLE, _HALF = np.float32(LOG2E), np.float32(0.5)
_LEAST_SINGLE, _MOST_SINGLE, _INFINITE = np.float32(-88.0), np.float32(88.3), np.float32(np.inf)


@njit(fastmath={"contract", "nsz"})
def exp_single(x):
    """``e^x`` in float32; 0 below ``2^-126``, infinite above ``e^88.3``."""
    beyond = x > _MOST_SINGLE
    x = _LEAST_SINGLE if x < _LEAST_SINGLE else x
    x = _MOST_SINGLE if beyond else x
    k = np.floor(x * _LOG2E_SINGLE + _HALF)
    r = (x - k * _HIGH_SINGLE) - k * _LOW_SINGLE
    p = _F6 + _F7 * r
    p = _F5 + p * r
    p = _F4 + p * r
    p = _F3 + p * r
    p = _F2 + p * r
    p = _F1 + p * r
    p = np.float32(1.0) + p * r
    found = p * _single_of_bits((np.int32(k) + np.int32(127)) << np.int32(23))
    return _INFINITE if beyond else found


_D = [1.0 / math.factorial(k) for k in range(14)]
_D2, _D3, _D4, _D5, _D6, _D7, _D8, _D9, _D10, _D11, _D12, _D13 = _D[2:]
_HIGH_DOUBLE = float.fromhex("0x1.62e42fee00000p-1")
_LOW_DOUBLE = float.fromhex("0x1.a39ef35793c76p-33")


@njit(fastmath={"contract", "nsz"})
def exp_double(x):
    """``e^x`` in float64; 0 below ``2^-1022``, infinite above ``e^709.4``."""
    beyond = x > 709.4
    x = -709.1 if x < -709.1 else x
    x = 709.4 if beyond else x
    k = np.floor(x * LOG2E + 0.5)
    r = (x - k * _HIGH_DOUBLE) - k * _LOW_DOUBLE
    p = _D12 + _D13 * r
    p = _D11 + p * r
    p = _D10 + p * r
    p = _D9 + p * r
    p = _D8 + p * r
    p = _D7 + p * r
    p = _D6 + p * r
    p = _D5 + p * r
    p = _D4 + p * r
    p = _D3 + p * r
    p = _D2 + p * r
    p = 1.0 + p * r
    p = 1.0 + p * r
    found = p * _double_of_bits((np.int64(k) + np.int64(1023)) << np.int64(52))
    return np.inf if beyond else found
