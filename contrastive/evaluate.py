"""How good are embeddings? A logistic probe, a probe with few labels, and nearest neighbours."""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from contrastive.data import Images


def evaluate(encoder: nn.Module, data: Images, *, draws: int = 5, seed: int = 0) -> dict[str, float]:
    """Return the accuracies, on the test part, of simple classifiers on frozen embeddings.

    Args:
        encoder: Maps images (N, channels, size, size) to embeddings (N, D). `torch.nn.Flatten()` scores raw pixels.
        data: The images and their labels.
        draws: How many draws of 10 labels per class "probe@10" is averaged over. The draws depend on `seed` alone,
            so that all encoders are given the same labels.
        seed: Seed of the draws, a non-negative integer.

    Returns:
        Shares of right answers in [0, 1]: "probe" (logistic regression on all labels), "probe@10" (on 10 labels per
        class: the number to compare methods by), "knn5" and "knn20" (5 and 20 nearest neighbours by cosine).

    Raises:
        ValueError: An embedding is NaN or infinite, or a part holds too few images or classes.
    """
    train, test = embed(encoder, data.train), embed(encoder, data.test)
    parts = (train, data.train_labels, test, data.test_labels)
    few = [probe(*parts, per_class=10, seed=seed + draw) for draw in range(draws)]
    neighbours = {"knn5": knn(*parts, k=5), "knn20": knn(*parts, k=20)}
    return {"probe": probe(*parts), "probe@10": float(np.mean(few)), **neighbours}


def compare(encoder: nn.Module, untrained: nn.Module, data: Images) -> dict[str, dict[str, float]]:
    """Return `evaluate` for a trained encoder beside what it has to beat: itself before training, and raw pixels."""
    rows = {"trained": encoder, "untrained": untrained, "raw pixels": nn.Flatten()}
    return {name: evaluate(row, data) for name, row in rows.items()}


def embed(encoder: nn.Module, images: Tensor, *, batch_size: int = 1024) -> NDArray[np.float64]:
    """Return the embeddings, shape (N, D), computed in evaluation mode and without gradients."""
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            return torch.cat([encoder(part) for part in images.split(batch_size)]).double().cpu().numpy()
    finally:
        encoder.train(was_training)


def probe(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: ArrayLike,
    test_y: ArrayLike,
    *,
    per_class: int | None = None,
    seed: int = 0,
) -> float:
    """Return the test accuracy of logistic regression on standardised features.

    Args:
        train_x: Training features, shape (N, D).
        train_y: Training labels, shape (N,).
        test_x: Test features, shape (M, D).
        test_y: Test labels, shape (M,).
        per_class: Draw this many training labels of each class; None uses all. The features are standardised with
            the mean and deviation of the whole training part either way: that needs no labels.
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
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train_x, train_y = _checked(train_x, train_y, part="training")
    test_x, test_y = _checked(test_x, test_y, part="test")
    if len(np.unique(train_y)) < 2:
        raise ValueError("the training labels hold one class only: a classifier needs two; was sorted data cut?")
    chosen = slice(None) if per_class is None else _draw(train_y, per_class, seed)
    scale = StandardScaler().fit(train_x)
    model = LogisticRegression(max_iter=2000).fit(scale.transform(train_x[chosen]), train_y[chosen])
    return float(model.score(scale.transform(test_x), test_y))


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
    similarity = _unit(test_x) @ _unit(train_x).T
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    classes, codes = np.unique(train_y, return_inverse=True)
    votes = np.eye(len(classes), dtype=int)[codes[nearest]].sum(axis=1)
    return float(np.mean(classes[votes.argmax(axis=1)] == test_y))


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
    x, y = np.asarray(features, dtype=float), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
        raise ValueError(
            f"{part} features of shape {x.shape} with labels of shape {y.shape}: expected (N, D) and (N,) with N >= 1."
        )
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).any(axis=1).sum())
        raise ValueError(
            f"{bad} of {len(x)} {part} embeddings are NaN or infinite: training has most likely diverged; "
            "train again with a smaller learning_rate or a larger temperature."
        )
    return x, y
