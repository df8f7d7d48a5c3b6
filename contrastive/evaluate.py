"""How good are embeddings? Probes, nearest neighbours, retrieval of the other side of a pair, and the shape of the cloud."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from contrastive.batches import generator
from contrastive.data import Dataset
from contrastive.encoders import Towers, Twin
from contrastive.views import recipe
from iotsolve.progress import bar

__all__ = ["LAYERS", "compare", "embed", "evaluate", "knn", "probe", "recall", "save_embeddings", "shown", "sides"]

LAYERS = ("embedding", "features")
PARTS = ("probe", "probe@10", "probe@100", "neighbours", "pairs")  # of an evaluation; without labels the last alone
_PAIRS = 1000  # test pairs that retrieval and the shape of the cloud are measured on, at most
_LABELS = 2000  # labels that "probe" is fitted to, at most


def evaluate(
    model: nn.Module,
    data: Dataset,
    *,
    layer: str = "embedding",
    draws: int = 5,
    seed: int = 0,
    advance: Callable[[str], None] = lambda part: None,
) -> dict[str, float]:
    """Return what simple classifiers make of frozen embeddings, and what can be said of them without labels.

    Args:
        model: Makes embeddings: a run's model, or any module from inputs (N, ...) to (N, D). `torch.nn.Flatten()` scores the raw
            inputs.
        data: The inputs, and their labels if there are any.
        layer: "embedding", which the loss saw, or "features", before the head.
        draws: How many draws of labels "probe@10" and "probe@100" are averaged over. The draws depend on `seed` alone,
            so that all models are given the same labels. The penalty is chosen on a part of the first.
        seed: Seed of the draws, a non-negative integer.
        advance: Called with the name of each of `PARTS` when it is done with.

    Returns:
        With labels, shares of right answers on the test part, in [0, 1]: "probe" (logistic regression on all labels, of more than
        2,000 on that many), "probe@10" and "probe@100" (on that many labels per class: the numbers to compare methods by),
        "knn5", "knn20", "knn200" (nearest neighbours by cosine); what there are too few inputs for is left out. Always, of the
        first 1,000 test pairs (two random views of each input where there are no partners): "R@1" and "R@10", the share of left
        sides with a partner among the 1 or 10 nearest right sides, "R@1 back" and "R@10 back" the other way where the sides
        differ; "alignment", "uniformity", "rankme", "hubness" as in :class:`contrastive.Diagnostics`.

    Raises:
        ValueError: An embedding is NaN or infinite, there is one class only, or no such layer.
    """
    left, right = sides(model, layer)
    scores: dict[str, float] = {}
    if data.train_labels is not None and data.test_labels is not None:
        parts = (embed(left, data.train), data.train_labels, embed(left, data.test), data.test_labels)
        _warn_of_strange_classes(data)
        scores["probe"] = probe(*parts, most=_LABELS, seed=seed)
        advance("probe")
        least = int(data.train_labels.bincount()[data.train_labels.unique()].min())
        for each in (10, 100):
            if each <= least:
                scores[f"probe@{each}"] = _few(*parts, each, [seed + draw for draw in range(draws)])
            advance(f"probe@{each}")
        scores |= {f"knn{k}": knn(*parts, k=k) for k in (5, 20, 200) if k <= len(data.train)}
        advance("neighbours")
    scores |= _of_pairs(left, right, data)
    advance("pairs")
    return scores


def _warn_of_strange_classes(data: Dataset) -> None:
    strange = ~torch.isin(data.test_labels, data.train_labels)
    if strange.any():
        warnings.warn(
            f"{int(strange.sum())} of the {len(strange)} test inputs of {data.name!r} are of classes without a training input: "
            "no probe and no neighbour can name them, and they count as wrong.",
            RuntimeWarning,
            stacklevel=3,
        )


def _few(x: NDArray, y: Tensor, test_x: NDArray, test_y: Tensor, each: int, seeds: list[int]) -> float:
    """Mean accuracy over draws of labels; the penalty is chosen on a part of the first."""
    penalty, right = None, []
    for seed in seeds:
        fitted = probing(x, y, per_class=each, seed=seed, penalty=penalty)
        penalty = fitted.penalty
        right.append(float(np.mean(fitted.predict(test_x) == test_y.numpy())))
    return float(np.mean(right))


def compare(
    model: nn.Module, untrained: nn.Module, data: Dataset, *, layer: str = "embedding"
) -> dict[str, dict[str, float]]:
    """Return `evaluate` for a trained model beside what it has to beat: itself before training, and the raw inputs."""
    rows = {"trained": (model, layer), "untrained": (untrained, layer)}
    raw = _raw(data)
    if raw is not None:
        rows["raw pixels" if data.train.ndim == 4 else "raw inputs"] = raw, "embedding"
    with bar("scoring", len(rows) * len(PARTS)) as advance:
        return {
            name: evaluate(module, data, layer=own, advance=lambda part, name=name: advance(f"{name}: {part}"))
            for name, (module, own) in rows.items()
        }


def embed(model: nn.Module, inputs: Tensor, *, batch_size: int = 1024) -> NDArray[np.float32]:
    """Return the embeddings, shape (N, D), computed in evaluation mode and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(part).float().cpu() for part in inputs.split(batch_size)]).numpy()
    finally:
        model.train(was_training)


def save_embeddings(
    model: nn.Module, data: Dataset, out: str | Path, *, layer: str = "embedding"
) -> dict[str, tuple[int, ...]]:
    """Write the embeddings of both parts of the data, with what is known of each row.

    "train_rows" and "test_rows" are places in what the data were made of: rows of the arrays, or of "files", the names of the
    images. "train_labels" are places in "classes". Strings are arrays of a `.npz`, and JSON in the metadata of a `.safetensors`.

    Args:
        model: A run's model.
        data: The inputs.
        out: File to write: `.npz`, or `.safetensors`.
        layer: "embedding" or "features".

    Returns:
        The shapes of what was written, by name: "train", "test", "train_partners", "train_labels", ...

    Raises:
        ValueError: The name ends otherwise, or there is no such layer.
    """
    out = Path(out)
    if out.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"out={out}: the name must end in .npz or .safetensors, which says what is written.")
    left, right = sides(model, layer)
    arrays: dict[str, NDArray] = {}
    made = [(part, left) for part in ("train", "test")]
    if data.is_paired:
        made += [(f"{part}_partners", right) for part in ("train", "test")]
    with bar("embedding", sum(-(-len(getattr(data, name)) // 1024) for name, _ in made)) as advance:
        for name, side in made:
            found = []
            for inputs in getattr(data, name).split(1024):
                found.append(embed(side, inputs))
                advance(name)
            arrays[name] = np.concatenate(found)
    for part in ("train", "test"):
        for what in ("rows", "labels", "ids"):
            known = getattr(data, f"{part}_{what}")
            if known is not None:
                arrays[f"{part}_{what}"] = known.numpy()
    words = {name: getattr(data, name) for name in ("files", "classes") if getattr(data, name) is not None}
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f"{out.name}.tmp{out.suffix}")  # numpy adds a suffix of its own to any other name
    try:
        if out.suffix == ".npz":
            np.savez(fresh, **arrays, **{name: np.array(some) for name, some in words.items()})
        else:
            from safetensors.numpy import save_file

            save_file(arrays, fresh, metadata={name: json.dumps(some) for name, some in words.items()})
        fresh.replace(out)
    finally:
        fresh.unlink(missing_ok=True)
    return {name: array.shape for name, array in arrays.items()}


def shown(metric: str, value: float | None) -> str:
    """A score as people read it: shares in per cent."""
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if metric.startswith(("probe", "knn", "R@")) else f"{value:.2f}"


def recall(left: ArrayLike, right: ArrayLike, *, k: int, ids: ArrayLike | None = None) -> float:
    """Return the share of left sides that have a partner among their `k` nearest right sides by cosine.

    Args:
        left: Shape (N, D).
        right: Shape (N, D); row i is the partner of row i of `left`.
        k: How many are looked at, at least 1.
        ids: Groups, shape (N,): all right sides of one's group are partners.

    Returns:
        A share in [0, 1]. Of right sides that are equally near, the one in question comes last: an encoder that makes everything
        alike finds nothing.

    Example:
        >>> recall(np.eye(3), np.eye(3)[[0, 2, 1]], k=1)
        0.3333333333333333
    """
    x, y = np.asarray(left, float), np.asarray(right, float)
    if x.ndim != 2 or x.shape != y.shape or not len(x):
        raise ValueError(f"left {x.shape} and right {y.shape}: must both be (N, D), row i of the one the partner of the other's.")
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k = {k!r}: must be a whole number, at least 1.")
    _finite(x, "left"), _finite(y, "right")
    x, y = _unit(x), _unit(y)
    groups = np.arange(len(x)) if ids is None else np.asarray(ids)
    found = 0
    for start in range(0, len(x), 500):
        similar = x[start : start + 500] @ y.T
        partner = groups[start : start + 500, None] == groups
        best = np.where(partner, similar, -np.inf).max(1, keepdims=True)
        found += int((((similar >= best - 1e-12) & ~partner).sum(1) < k).sum())
    return found / len(x)


def _of_pairs(left: Callable, right: Callable, data: Dataset) -> dict[str, float]:
    from contrastive import InfoNCELoss
    from contrastive.diagnostics import Diagnostics

    inputs = data.test[:_PAIRS]
    ids = None if data.test_ids is None else data.test_ids[:_PAIRS]
    if data.is_paired:
        pair = inputs, data.test_partners[:_PAIRS]
    else:
        view, draw = recipe("auto", inputs[:1]), generator(0, "evaluation")
        pair = view(inputs, draw), view(inputs, draw)
    x, y = embed(left, pair[0]), embed(right, pair[1])
    _finite(x, "test"), _finite(y, "test")
    scores = {f"R@{k}": recall(x, y, k=k, ids=ids) for k in (1, 10)}
    if data.is_paired:
        scores |= {f"R@{k} back": recall(y, x, k=k, ids=ids) for k in (1, 10)}
    if len(x) < 3 or x.shape[1] != y.shape[1]:
        return scores
    criterion = InfoNCELoss(1.0)
    epsilon, batches = criterion.read(torch.from_numpy(x), torch.from_numpy(y))
    seen = Diagnostics(criterion, batches[0], epsilon)
    return scores | {name: float(getattr(seen, name)) for name in ("alignment", "uniformity", "rankme", "hubness")}


def sides(model: nn.Module, layer: str = "embedding") -> tuple[nn.Module, nn.Module]:
    """What embeds the left and the right side: of a run's model, or twice any other module.

    Raises:
        ValueError: No such layer, or the module has no features.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer={layer!r} is not one of {', '.join(LAYERS)}.")
    found = model.sides if isinstance(model, Towers | Twin) else (model, model)
    if layer == "embedding":
        return found
    for side in found:
        if not hasattr(side, "features"):
            raise ValueError(
                f"layer='features', and {type(side).__name__} has no method features(inputs): use layer='embedding'."
            )
    return tuple(map(_Features, found))


class _Features(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encoder.features(inputs)


class _Bag(nn.Module):
    """How often each n-gram occurs."""

    def forward(self, inputs: Tensor) -> Tensor:
        from contrastive.text import BUCKETS

        counts = torch.zeros(len(inputs), BUCKETS)
        counts.scatter_add_(1, inputs, (inputs > 0).float())
        return counts


def _raw(data: Dataset) -> nn.Module | None:
    """What makes embeddings of raw inputs, where both sides have them in one space."""
    if data.is_paired and data.train.shape[1:] != data.train_partners.shape[1:]:
        return None
    return nn.Flatten() if data.train.is_floating_point() else _Bag()


def probe(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: ArrayLike,
    test_y: ArrayLike,
    *,
    per_class: int | None = None,
    most: int | None = None,
    seed: int = 0,
) -> float:
    """Return the test accuracy of logistic regression on standardised features, its L2 penalty chosen on a part of the labels.

    A fifth of the labelled inputs, or of each class one, is held out; of the penalties that do best on it the strongest is taken
    and the model fitted again to all.

    Args:
        train_x: Training features, shape (N, D).
        train_y: Training labels, shape (N,).
        test_x: Test features, shape (M, D).
        test_y: Test labels, shape (M,).
        per_class: Draw this many training labels of each class; None uses all. The features are standardised with
            the mean and deviation of the whole training part either way: that needs no labels.
        most: Without `per_class`, draw this many training labels if there are more.
        seed: Seed of the draw.

    Returns:
        The share of test labels predicted right, in [0, 1].

    Raises:
        ValueError: Features are not finite, shapes disagree, there is one class only, or a class has fewer than
            `per_class` labels.

    Example:
        >>> probe([[-1.0], [-2.0], [1.0], [2.0]], [0, 0, 1, 1], [[-3.0], [3.0]], [0, 1])
        1.0
    """
    fitted = probing(train_x, train_y, per_class=per_class, most=most, seed=seed)
    test_x, test_y = _checked(test_x, test_y, part="test")
    return float(np.mean(fitted.predict(test_x) == test_y))


@dataclass(frozen=True)
class Probe:
    """A fitted probe: labels from features, and the penalty that was chosen."""

    predict: Callable[[NDArray], NDArray]
    penalty: float


def probing(
    train_x: ArrayLike,
    train_y: ArrayLike,
    *,
    per_class: int | None = None,
    most: int | None = None,
    seed: int = 0,
    penalty: float | None = None,
) -> Probe:
    """Return what :func:`probe` predicts with; arguments and errors are its, and `penalty` is one that was chosen before."""
    from sklearn.preprocessing import StandardScaler

    train_x, train_y = _checked(train_x, train_y, part="training")
    if len(np.unique(train_y)) < 2:
        raise ValueError("the training labels hold one class only: a classifier needs two; was sorted data cut?")
    if per_class is not None:
        chosen = _draw(train_y, per_class, seed)
    else:
        chosen = np.arange(len(train_y))
        if most is not None and most < len(chosen):
            chosen = np.random.default_rng(seed).choice(len(chosen), most, replace=False)
            if len(np.unique(train_y[chosen])) < 2:
                raise ValueError(f"{most} labels drawn hold one class only: the others are too rare for a probe.")
    scale = StandardScaler().fit(train_x)
    x, y = scale.transform(train_x[chosen]).astype(float), train_y[chosen]
    # the penalised solution lies in the span of the inputs: the same problem, in fewer coordinates
    basis = np.linalg.qr(x.T)[0] if x.shape[1] > len(x) else np.eye(x.shape[1])
    x = x @ basis
    penalty = _chosen_penalty(x, y, seed) if penalty is None else penalty
    model = _logistic(x, y, penalty)
    return Probe(lambda features: model.predict(scale.transform(features).astype(float) @ basis), penalty)


def _chosen_penalty(x: NDArray, y: NDArray, seed: int) -> float:
    held = _held_out(y, seed)
    if not held.any() or len(np.unique(y[~held])) < 2:
        return 1.0
    right, model = [], None
    for strength in _PENALTIES:
        model = _logistic(x[~held], y[~held], strength, model)
        right.append(model.score(x[held], y[held]))
    return _PENALTIES[int(np.argmax(right))]


_PENALTIES = (1e4, 1e3, 1e2, 1e1, 1.0)  # times half the square of the weights, beside the sum over inputs


def _logistic(x: NDArray, y: NDArray, penalty: float, start: Any = None) -> Any:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / penalty, max_iter=2000, tol=1e-3, warm_start=True)
    if start is not None:  # the solution for the next stronger penalty is near
        model.coef_, model.intercept_, model.classes_ = start.coef_.copy(), start.intercept_.copy(), start.classes_
    return model.fit(x, y)


def _held_out(labels: NDArray, seed: int) -> NDArray[np.bool_]:
    """A fifth of each class, at least one, none of a class that has only one."""
    rng, held = np.random.default_rng([seed, 1]), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        if len(own) > 1:
            held[rng.choice(own, max(1, len(own) // 5), replace=False)] = True
    return held


def knn(train_x: ArrayLike, train_y: ArrayLike, test_x: ArrayLike, test_y: ArrayLike, *, k: int = 5) -> float:
    """Return the test accuracy of the majority vote of the `k` nearest training points by cosine.

    A tied vote goes to the smallest label. A zero vector has cosine 0 with everything.

    Args:
        train_x: Training features, shape (N, D).
        train_y: Training labels, shape (N,).
        test_x: Test features, shape (M, D).
        test_y: Test labels, shape (M,).
        k: Number of neighbours, 1 <= k <= N.

    Returns:
        The share of test labels predicted right, in [0, 1].

    Raises:
        ValueError: Features are not finite, shapes disagree, or k is out of range.

    Example:
        >>> knn([[1.0, 0.0], [0.0, 1.0]], [3, 7], [[2.0, 0.1], [0.1, 5.0]], [3, 7], k=1)
        1.0
    """
    train_x, train_y = _checked(train_x, train_y, part="training")
    test_x, test_y = _checked(test_x, test_y, part="test")
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k={k}: the number of neighbours must lie between 1 and the {len(train_x)} training points.")
    classes, codes = np.unique(train_y, return_inverse=True)
    bank, right = _unit(train_x), 0
    for start in range(0, len(test_x), 500):
        similarity = _unit(test_x[start : start + 500]) @ bank.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        votes = (codes[nearest][..., None] == np.arange(len(classes))).sum(axis=1)
        right += int((classes[votes.argmax(axis=1)] == test_y[start : start + 500]).sum())
    return right / len(test_x)


def _unit(x: NDArray) -> NDArray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(float).tiny)


def _draw(labels: NDArray, per_class: int, seed: int) -> NDArray:
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    if not 1 <= per_class <= counts.min():
        raise ValueError(
            f"per_class={per_class}: it must lie between 1 and {counts.min()}, the size of the smallest training class "
            f"({classes[counts.argmin()]})."
        )
    return np.concatenate([rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in classes])


def _checked(features: ArrayLike, labels: ArrayLike, *, part: str) -> tuple[NDArray, NDArray]:
    x, y = np.asarray(features), np.asarray(labels)
    x = x if x.dtype == np.float32 else x.astype(float)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
        raise ValueError(
            f"{part} features of shape {x.shape} with labels of shape {y.shape}: expected (N, D) and (N,) with N >= 1."
        )
    _finite(x, part)
    return x, y


def _finite(x: NDArray, part: str) -> None:
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).any(axis=1).sum())
        raise ValueError(
            f"{bad} of {len(x)} {part} embeddings are NaN or infinite: training has most likely diverged; "
            "train again with a smaller learning_rate or a larger temperature."
        )
