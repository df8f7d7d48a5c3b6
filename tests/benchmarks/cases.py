"""The problems: four kinds of cost, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("2d", "cosine", "random")
EPSILONS = {
    "2d": (0.1, 0.01, 0.001),
    "cosine": (0.1, 0.05, 0.01),
    "random": (0.1, 0.01, 0.001),
    "clusters": (0.1, 0.05, 0.01),
}


def cost(kind: str, n: int, seed: int = 0) -> np.ndarray:
    """Largest entry 1: squared distances in the unit square, 1 - cosine of 128-dimensional normal vectors, uniform numbers.

    Of normal vectors nearly all cosines are alike; ``clusters`` is what an encoder makes of twenty classes, which the two sides
    have in other shares.
    """
    rng = np.random.default_rng(seed)
    if kind == "2d":
        x, y = rng.random((n, 2)), rng.random((n, 2))
        found = np.square(x[:, None] - y[None]).sum(-1)
    elif kind in ("cosine", "clusters"):
        x, y = rng.standard_normal((n, 128)), rng.standard_normal((n, 128))
        if kind == "clusters":
            centres, shares = rng.standard_normal((20, 128)), rng.dirichlet(np.ones(20), 2)
            x, y = (0.3 * z + centres[rng.choice(20, n, p=p)] for z, p in zip((x, y), shares, strict=True))
        x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        found = 1 - x @ y.T
    else:
        found = rng.random((n, n))
    return found / found.max()


def weights(n: int, seed: int, *, uniform: bool) -> np.ndarray:
    """Of total 1."""
    if uniform:
        return np.full(n, 1 / n)
    w = np.random.default_rng(seed).random(n)
    return w / w.sum()


@dataclass(frozen=True)
class Entropic:
    """Balanced transport at ``epsilon > 0``, to an L1 error of both marginals together."""

    kind: str
    n: int
    epsilon: float
    accuracy: float

    @property
    def name(self) -> str:
        return f"{self.kind}, n = {self.n}, eps = {self.epsilon:g}"

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        uniform = weights(self.n, 1, uniform=True)
        return cost(self.kind, self.n), uniform, uniform


@dataclass(frozen=True)
class Exact:
    """Balanced transport without entropy, between equal weights or random ones."""

    kind: str
    n: int
    uniform: bool

    @property
    def name(self) -> str:
        return f"{self.kind}, n = {self.n}, {'equal' if self.uniform else 'random'} weights"

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, b = (weights(self.n, seed, uniform=self.uniform) for seed in (1, 2))
        return cost(self.kind, self.n), a, b


@dataclass(frozen=True)
class Partial:
    """Six tenths of the mass are moved, from and to no more than there is, without entropy."""

    kind: str
    n: int
    mass: float = 0.6

    @property
    def name(self) -> str:
        return f"{self.kind}, n = {self.n}"

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, b = (weights(self.n, seed, uniform=False) for seed in (1, 2))
        return cost(self.kind, self.n), a, b


@dataclass(frozen=True)
class Unbalanced:
    """Both sides pay ``rho KL``; accurate to an L1 distance of the plan from the optimal one, relative to its mass."""

    n: int
    epsilon: float
    rho: float
    accuracy: float = 1e-6

    @property
    def name(self) -> str:
        return f"2d, n = {self.n}, rho = {self.rho:g}, eps = {self.epsilon:g}"

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, b = (weights(self.n, seed, uniform=False) for seed in (1, 2))
        return cost("2d", self.n), a, b


@dataclass(frozen=True)
class Many:
    """A thousand problems of 64 x 64 at once, points in the plane."""

    epsilon: float
    accuracy: float = 1e-6
    count: int = 1000
    n: int = 64

    @property
    def name(self) -> str:
        return f"{self.count} of {self.n} x {self.n}, eps = {self.epsilon:g}"

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        x, y = rng.random((self.count, self.n, 1, 2)), rng.random((self.count, 1, self.n, 2))
        found = np.square(x - y).sum(-1)
        uniform = weights(self.n, 1, uniform=True)
        return found / found.max((1, 2), keepdims=True), uniform, uniform


@dataclass(frozen=True)
class ManyExact:
    """A thousand problems at once without entropy, points in the plane; random weights, equal ones, or six tenths of the mass."""

    n: int
    weights: str
    count: int = 1000

    @property
    def name(self) -> str:
        return f"{self.count} of {self.n} x {self.n}, {self.weights}"

    @property
    def mass(self) -> float | None:
        return 0.6 if self.weights == "partial" else None

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        cost, even, _ = Many(0.0, count=self.count, n=self.n).data()
        if self.weights == "equal weights":
            return cost, *2 * (np.broadcast_to(even, cost.shape[:2]),)
        a, b = (np.random.default_rng(seed).random(cost.shape[:2]) for seed in (1, 2))
        return cost, a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True)


@dataclass(frozen=True)
class Clouds:
    """Balanced transport between points whose costs nobody holds, to an L1 error of both marginals together.

    Uniform in a cube, the other cloud drawn towards a corner; ``epsilon`` in squared diameters of the cube.
    """

    n: int
    d: int
    epsilon: float
    single: bool

    @property
    def accuracy(self) -> float:
        return 1e-4 if self.single else 1e-8

    @property
    def name(self) -> str:
        return f"n = {self.n}, d = {self.d}, eps = {self.epsilon:g}"

    def data(self) -> tuple[np.ndarray, np.ndarray, float]:
        rng = np.random.default_rng(0)
        x, y = rng.random((self.n, self.d)), rng.random((self.n, self.d)) ** 1.3
        dtype = np.float32 if self.single else np.float64
        return x.astype(dtype), y.astype(dtype), self.epsilon * self.d
