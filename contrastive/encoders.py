"""Encoders: images in, embeddings out."""

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three convolutions and a linear layer, 47 thousand weights at the defaults; no projector, no batch norm.

    The loss and the evaluation see the same embedding. Nothing in the network looks across the batch, so two losses
    that differ only in how they treat the batch are compared on equal terms.

    Args:
        channels: Channels of the images, at least 1.
        size: Side of the (square) images in pixels, at least 1.
        dim: Length of an embedding, at least 1.

    Raises:
        ValueError: An argument is not a positive integer.

    Example:
        >>> import torch
        >>> tuple(SmallCNN()(torch.zeros(5, 1, 8, 8)).shape)
        (5, 64)
    """

    def __init__(self, channels: int = 1, size: int = 8, *, dim: int = 64) -> None:
        super().__init__()
        for name, value in {"channels": channels, "size": size, "dim": dim}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a layer's width must be an integer of at least 1.")
        half = (size + 1) // 2  # a stride of 2 with padding 1 rounds up
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * half * half, dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings, shape (N, dim), of images of shape (N, channels, size, size); not normalised."""
        return self.layers(images)
