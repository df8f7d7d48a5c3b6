"""Encoders: inputs to features, features to embeddings.

Every encoder is a backbone and a head. The loss sees the embedding; what is kept for later use may be either. Nothing in the
networks here looks across the batch (no batch normalisation): two losses that differ only in how they treat the batch
are compared on equal terms, and a batch in parts, or on many processes, is the same batch.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from contrastive.data import Dataset
from contrastive.text import BUCKETS

__all__ = ["MLP", "Encoder", "NGrams", "ResNet18", "SmallCNN", "Towers", "make"]


class Encoder(nn.Module):
    """A backbone, whose output is made flat, and a head.

    Args:
        backbone: Maps inputs (N, ...) to features.
        head: Maps flat features (N, F) to embeddings (N, D).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def features(self, inputs: Tensor) -> Tensor:
        """Return the flat features, shape (N, F)."""
        return self.backbone(inputs).flatten(1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the embeddings, shape (N, D), not normalised."""
        return self.head(self.features(inputs))


class SmallCNN(Encoder):
    """Three convolutions and a linear layer, 47 thousand weights at the defaults.

    Args:
        channels: Channels of the images, at least 1.
        size: Side of the (square) images in pixels, at least 1.
        dim: Length of an embedding, at least 1.

    Raises:
        ValueError: An argument is not a positive integer.

    Example:
        >>> tuple(SmallCNN()(torch.zeros(5, 1, 8, 8)).shape)
        (5, 64)
    """

    def __init__(self, channels: int = 1, size: int = 8, *, dim: int = 64) -> None:
        _check_widths(channels=channels, size=size, dim=dim)
        half = (size + 1) // 2  # a stride of 2 with padding 1 rounds up
        convolutions = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        super().__init__(convolutions, nn.Linear(32 * half * half, dim))


class ResNet18(Encoder):
    """ResNet-18 for small images: a 3 x 3 stem without pooling, group normalisation, a projector of two layers.

    He et al. (CVPR 2016) with the stem that SimCLR uses on CIFAR (Chen et al., ICML 2020, appendix B.9) and GroupNorm (Wu and He,
    ECCV 2018) in the place of batch normalisation. The features are the 512 averages of the last stage.

    Args:
        channels: Channels of the images, at least 1.
        dim: Length of an embedding, at least 1.
        width: Channels of the first stage, a multiple of 8; 64 is ResNet-18.

    Raises:
        ValueError: An argument is not a positive integer.

    Example:
        >>> tuple(ResNet18(3, dim=16, width=8)(torch.zeros(2, 3, 16, 16)).shape)
        (2, 16)
    """

    def __init__(self, channels: int = 3, *, dim: int = 128, width: int = 64) -> None:
        _check_widths(channels=channels, dim=dim, width=width)
        stages, last = [], width
        for stage in range(4):
            for block in range(2):
                wide = width * 2**stage
                stages.append(_Residual(last, wide, stride=2 if stage and not block else 1))
                last = wide
        stem = [nn.Conv2d(channels, width, 3, padding=1, bias=False), _norm(width), nn.ReLU()]
        super().__init__(nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1)), _projector(last, dim))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            _norm(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            _norm(after),
        )
        same = before == after and stride == 1
        shortcut = [] if same else [nn.Conv2d(before, after, 1, stride=stride, bias=False), _norm(after)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class MLP(Encoder):
    """Two hidden layers on vectors, and a linear head.

    Args:
        inputs: Length of an input vector, at least 1.
        dim: Length of an embedding, at least 1.
        hidden: Width of the hidden layers, at least 1.

    Example:
        >>> tuple(MLP(10, dim=4)(torch.zeros(3, 10)).shape)
        (3, 4)
    """

    def __init__(self, inputs: int, *, dim: int = 64, hidden: int = 256) -> None:
        _check_widths(inputs=inputs, dim=dim, hidden=hidden)
        layers = [nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), nn.Linear(hidden, dim))


class NGrams(Encoder):
    """The mean of the vectors of a text's n-grams, and a hidden layer (after fastText, Bojanowski et al., TACL 2017).

    Args:
        dim: Length of an embedding, at least 1.
        buckets: Numbers that an n-gram may have; 0 is none.
        hidden: Length of an n-gram's vector, at least 1.

    Example:
        >>> from contrastive.text import ngrams
        >>> tuple(NGrams(dim=8)(ngrams(["eel", "fish"])).shape)
        (2, 8)
    """

    def __init__(self, *, dim: int = 64, buckets: int = BUCKETS, hidden: int = 128) -> None:
        _check_widths(dim=dim, buckets=buckets, hidden=hidden)
        vectors = nn.EmbeddingBag(buckets, hidden, mode="mean", padding_idx=0)
        super().__init__(vectors, nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, dim)))


class Towers(nn.Module):
    """An encoder for each side of a pair."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    @property
    def sides(self) -> tuple[nn.Module, nn.Module]:
        """What embeds the left and the right side."""
        return self.left, self.right

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both sides."""
        return self.left(left), self.right(right)


class Twin(nn.Module):
    """One encoder for both sides of a pair, which it sees as one batch."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def sides(self) -> tuple[nn.Module, nn.Module]:
        """What embeds the left and the right side."""
        return self.encoder, self.encoder

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both sides."""
        return self.encoder(torch.cat([left, right])).chunk(2)


def make(name: str, example: Tensor, *, dim: int) -> nn.Module:
    """Return a fresh encoder for inputs like `example`, its weights drawn from torch's global random numbers.

    Args:
        name: "auto" (by the inputs), "small-cnn", "resnet18", "mlp" or "ngrams"; "timm:" and the name of one of its models; or
            "package.module:Name" of a callable that returns an `nn.Module`, given those of `dim` and `example` that
            are among its arguments.
        example: Some inputs, shape (N, ...), N >= 1.
        dim: Length of an embedding.

    Raises:
        ValueError: There is no such encoder, it does not fit the inputs, or does not return (N, dim).
    """
    if name == "auto":
        name = "ngrams" if not example.is_floating_point() else "small-cnn" if example.ndim == 4 else "mlp"
    if name in _KNOWN:
        axes, make_known = _KNOWN[name]
        if axes != (example.ndim if example.is_floating_point() else 0) and axes is not None:
            raise ValueError(
                f"encoder={name!r} does not fit inputs of shape (N, {', '.join(map(str, example.shape[1:]))}) "
                f"and {example.dtype}: 'auto' chooses by the shape."
            )
        return make_known(example, dim)
    if name.startswith("timm:"):
        return _from_timm(name.removeprefix("timm:"), example, dim)
    if ":" in name:
        return _checked(_imported(name, example, dim), name, example, dim)
    raise ValueError(
        f"encoder={name!r} is not a known encoder: choose auto, {', '.join(_KNOWN)}, timm:NAME or package.module:Name."
    )


_KNOWN: dict[str, tuple[int | None, Callable[[Tensor, int], nn.Module]]] = {
    "small-cnn": (4, lambda x, dim: SmallCNN(x.shape[1], x.shape[2], dim=dim)),
    "resnet18": (4, lambda x, dim: ResNet18(x.shape[1], dim=dim)),
    "mlp": (None, lambda x, dim: MLP(x[0].numel(), dim=dim)),
    "ngrams": (0, lambda x, dim: NGrams(dim=dim)),
}


def _from_timm(name: str, example: Tensor, dim: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ValueError(f"encoder='timm:{name}' needs timm, which is not installed: pip install timm.") from None
    try:
        backbone = timm.create_model(name, num_classes=0, in_chans=example.shape[1])
    except RuntimeError as error:
        raise ValueError(f"encoder='timm:{name}': {error}; timm.list_models() gives the names.") from error
    return Encoder(backbone, _projector(backbone.num_features, dim))


def _imported(name: str, example: Tensor, dim: int) -> Any:
    import inspect

    module, _, attribute = name.partition(":")
    try:
        build = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"encoder={name!r} cannot be imported ({error}): is it on PYTHONPATH, and spelled package.module:Name?"
        ) from error
    if not callable(build):
        raise ValueError(
            f"encoder={name!r} is of type {type(build).__name__}, which cannot be called: give a class or a function."
        )
    if isinstance(build, nn.Module):
        raise ValueError(
            f"encoder={name!r} is a module already, whose weights no seed decides: give its class, or a function."
        )
    try:
        takes = inspect.signature(build).parameters
    except ValueError:  # of something compiled
        takes = {}
    given = {key: value for key, value in {"dim": dim, "example": example}.items() if key in takes}
    try:
        return build(**given)
    except TypeError as error:
        raise ValueError(
            f"encoder={name!r} could not be called with {', '.join(given) or 'nothing'} ({error}): of its arguments only dim and "
            "example are given, so all others need a default."
        ) from error


def _checked(model: Any, name: str, example: Tensor, dim: int) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"encoder={name!r} returned {type(model).__name__}, not a torch.nn.Module.")
    model.eval()
    try:
        with torch.no_grad():
            found = model(example[:2])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"encoder={name!r} cannot read inputs of shape (N, {', '.join(map(str, example.shape[1:]))}) "
            f"and {example.dtype}: {error}."
        ) from error
    model.train()
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(example[:2]):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"encoder={name!r} made {shape} of {len(example[:2])} inputs: one flat embedding for each is needed."
        )
    return model


def _projector(width: int, dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(max(1, channels // 8), channels)


def _check_widths(**widths: int) -> None:
    for name, value in widths.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: a layer's width must be an integer of at least 1.")


def of(data: Dataset, name: str, dim: int) -> nn.Module:
    """Return the model that makes embeddings of both sides of the data's pairs; two towers of one kind start alike.

    Starting alike, towers for texts find words that are spelled the same in both languages before they have learned anything.
    """
    left = make(name, data.train[:2], dim=dim)
    if not data.is_paired:
        return Twin(left)
    state = torch.get_rng_state()
    right = make(name, data.train_partners[:2], dim=dim)
    if data.train.shape[1:] == data.train_partners.shape[1:]:
        right.load_state_dict(left.state_dict())
    torch.set_rng_state(state)
    return Towers(left, right)
