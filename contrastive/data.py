"""Image data held in memory, split so that the test part is a real change of source, and its augmentation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Images:
    """Images and labels, already split.

    Args:
        train: Training images, float32, shape (N, channels, size, size), values in [0, 1].
        train_labels: Class of each training image, int64, shape (N,). Contrastive training never looks at them.
        test: Test images, as `train`.
        test_labels: Class of each test image.
        name: The name under which `load` knows the data.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    name: str


def digits() -> Images:
    """Return scikit-learn's 1797 handwritten digits (8 x 8): the first 1200 to train, the last 597 to test.

    The file keeps the digits of one writer together, so a split by file order tests on other writers; a shuffled
    split would put every writer into both parts and flatter every method.

    Example:
        >>> data = digits()
        >>> tuple(data.train.shape), tuple(data.test.shape)
        ((1200, 1, 8, 8), (597, 1, 8, 8))
    """
    from sklearn.datasets import load_digits  # a second of import that `contrastive train --help` should not pay

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div(16).view(-1, 1, 8, 8)  # the file counts ink from 0 to 16
    classes = torch.from_numpy(labels).long()
    return Images(images[:1200], classes[:1200], images[1200:], classes[1200:], name="digits")


DATASETS: dict[str, Callable[[], Images]] = {"digits": digits}


def load(name: str) -> Images:
    """Return the data set called `name`.

    Args:
        name: A key of `DATASETS`.

    Raises:
        ValueError: There is no such data set; the message lists those there are.
    """
    if name not in DATASETS:
        raise ValueError(f"data={name!r} is not a known data set: choose one of {', '.join(sorted(DATASETS))}.")
    return DATASETS[name]()


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float = 15.0,
    shift: float = 0.1,
    scale: float = 0.1,
    noise: float = 0.05,
) -> Tensor:
    """Return one random view of each image: rotated, scaled, shifted, with Gaussian noise added.

    Args:
        images: Shape (N, channels, height, width).
        generator: The only source of randomness: the same state gives the same views.
        degrees: Largest rotation either way, in degrees.
        shift: Largest shift along each axis, as a share of the image's side.
        scale: Largest relative change of size.
        noise: Standard deviation of the noise, in the unit of the pixels. It is not clipped, so values may leave
            [0, 1]: clipping would silence half of it on the black background.

    Returns:
        The views, shape of `images`; what comes in from outside the frame is 0.

    Example:
        >>> views = augment(torch.ones(2, 1, 8, 8), torch.Generator().manual_seed(0))
        >>> again = augment(torch.ones(2, 1, 8, 8), torch.Generator().manual_seed(0))
        >>> tuple(views.shape), torch.equal(views, again), torch.equal(views[0], views[1])
        ((2, 1, 8, 8), True, False)
    """
    angle, zoom, right, down = (2 * torch.rand(4, len(images), generator=generator) - 1).to(images)
    angle, zoom = angle * math.radians(degrees), 1 + scale * zoom
    # affine_grid maps output to input coordinates, which run from -1 to 1: a whole side is 2 long
    rows = [zoom * angle.cos(), -zoom * angle.sin(), 2 * shift * right]
    columns = [zoom * angle.sin(), zoom * angle.cos(), 2 * shift * down]
    theta = torch.stack([torch.stack(rows, dim=1), torch.stack(columns, dim=1)], dim=1)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    return moved + noise * torch.randn(images.shape, generator=generator).to(images)
