"""Two views of the same thing: random changes after which a person would still say what it is.

The changes are kornia's and one pass over a block of a batch. A block has its own seed, made of the run's seed, the step and
the block's place: any part of any step can be made without the parts before it, by any number of processes.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

__all__ = ["RECIPES", "augment"]

RECIPES = ("auto", "affine", "photo", "noise", "none")


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
        scale: Largest relative change of size, below 1.
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
    with _drawing_from(generator):
        return _with_noise(_affine(degrees, shift, scale)(images), noise)


def photo(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return one random view of each photograph: SimCLR's crop, mirror, colours, grey and blur (Chen et al., ICML 2020).

    Args:
        images: Shape (N, channels, height, width), values in [0, 1]; colours change where there are three channels.
        generator: The only source of randomness.
    """
    with _drawing_from(generator):
        return _photo(images.shape[1] == 3, tuple(images.shape[2:]))(images)


def noise(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return one random view of each vector: a tenth of its entries replaced by another row's (SCARF, Bahri et al.,
    ICLR 2022), and noise.

    Args:
        rows: Shape (N, D), or any shape of which the first axis counts.
        generator: The only source of randomness.
    """
    hidden = torch.rand(rows.shape, generator=generator).to(rows.device) < 0.1
    others = rows[torch.randint(len(rows), (len(rows),), generator=generator).to(rows.device)]
    return _with_noise(torch.where(hidden, others, rows), 0.05, generator)


def none(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return what came in, for pairs that need no second view."""
    return rows


def recipe(name: str, example: Tensor) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return the recipe called `name`; "auto" looks at one batch's shape.

    Raises:
        ValueError: There is no such recipe, or it is for images and the data are none.
    """
    if name == "auto":
        name = "noise" if example.ndim != 4 else "photo" if example.shape[1] == 3 else "affine"
    if name not in RECIPES:
        raise ValueError(f"augmentation={name!r} is not a known recipe: choose one of {', '.join(RECIPES)}.")
    if name in ("affine", "photo") and example.ndim != 4:
        raise ValueError(
            f"augmentation={name!r} turns images, and the data have shape (N, {', '.join(map(str, example.shape[1:]))}): "
            "use 'noise', or 'auto', which chooses by the shape."
        )
    return {"affine": augment, "photo": photo, "noise": noise, "none": none}[name]


class _drawing_from:
    """Torch's global random numbers, which kornia draws from, taken from a generator for a while and then put back."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())

    def __exit__(self, *_: object) -> None:
        self.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(self.before)


def _with_noise(x: Tensor, deviation: float, generator: torch.Generator | None = None) -> Tensor:
    return x + deviation * torch.randn(x.shape, generator=generator).to(x)


@cache
def _affine(degrees: float, shift: float, scale: float) -> nn.Module:
    from kornia.augmentation import RandomAffine  # imported where images are trained on, by nothing else

    return RandomAffine(degrees, (shift, shift), (1 - scale, 1 + scale), p=1.0, padding_mode="zeros")


@cache
def _photo(coloured: bool, size: tuple[int, int]) -> nn.Module:
    from kornia import augmentation

    least = 0.2 if min(size) >= 64 else 0.4  # share of the picture that is left: of a small one more
    steps = [augmentation.RandomResizedCrop(size, scale=(least, 1.0), p=1.0), augmentation.RandomHorizontalFlip(p=0.5)]
    if coloured:
        steps += [augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), augmentation.RandomGrayscale(p=0.2)]
    if min(size) >= 64:  # a blur of a small picture leaves nothing to see
        kernel = min(size) // 10 | 1
        steps.append(augmentation.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5))
    return nn.Sequential(*steps)
