"""Which inputs a step sees, and how: a function of the seed and the step's number alone.

Nothing about the order has to be saved for a run to be resumed, and every process of many makes its own part of a batch.
"""

import numpy as np
import torch
from torch import Tensor

from contrastive.config import TrainConfig
from contrastive.data import Dataset, blocks, tail
from contrastive.views import recipe

__all__ = ["Batches", "generator"]

_BLOCK = 128  # pairs that are augmented at once, with a seed of their own


class Batches:
    """The batches of a run.

    Args:
        config: The run's configuration.
        data: Its data.

    Raises:
        ValueError: A batch is larger than the training part, labels that the configuration asks for are missing, or the recipe
            of the views does not fit the data.
    """

    def __init__(self, config: TrainConfig, data: Dataset) -> None:
        self.config, self.data = config, data
        self.rows = torch.arange(len(data.train))
        if config.imbalance > 1:
            if data.train_labels is None:
                raise ValueError(
                    f"imbalance={config.imbalance} with {data.name!r}, which has no labels: a long tail is one of classes."
                )
            self.rows = tail(data.train_labels, config.imbalance, generator(config.seed, "tail"))
        if config.loss == "supcon" and data.train_labels is None:
            raise ValueError(
                f"loss='supcon' with {data.name!r}, which has no labels: choose another loss, or give classes."
            )
        if config.batch_size > len(self.rows):
            raise ValueError(
                f"batch_size={config.batch_size} exceeds the {len(self.rows)} training inputs of {data.name!r}: no batch would "
                "ever be full; choose a smaller one."
            )
        self.per_epoch = len(self.rows) // config.batch_size
        self.total = config.epochs * self.per_epoch
        self._partners = self._broken()
        self._augment = recipe(
            "none" if data.is_paired and config.augmentation == "auto" else config.augmentation, data.train[:1]
        )
        self._order: tuple[int, Tensor] | None = None

    def members(self, step: int) -> Tensor:
        """Rows of the training inputs of a step, shape (batch_size,); what is left of an epoch is dropped.

        Pairs of one group come one after the other, so that they meet in a batch.
        """
        epoch, place = divmod(step, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            draw = generator(self.config.seed, "order", epoch)
            if self.data.train_ids is None:
                order = torch.randperm(len(self.rows), generator=draw)
            else:
                groups = self.data.train_ids[self.rows].unique(return_inverse=True)[1]
                order = torch.rand(int(groups.max()) + 1, generator=draw)[groups].argsort(stable=True)
            self._order = epoch, self.rows[order]
        size = self.config.batch_size
        return self._order[1][place * size : (place + 1) * size]

    def views(self, step: int, part: slice | None = None) -> tuple[Tensor, Tensor]:
        """Both sides of a step's pairs, or of a part of them.

        Returns:
            Two tensors of shape (size of the part, ...); row i of both is a pair.
        """
        members = self.members(step)
        part = slice(0, len(members)) if part is None else part
        found = []
        for block, own in blocks(part.start, part.stop, _BLOCK):
            rows = members[block * _BLOCK : (block + 1) * _BLOCK]
            draw = generator(self.config.seed, "augment", step, block)
            sides = self._augment(self.data.train[rows], draw), self._augment(self._other_side(rows), draw)
            found.append([side[own] for side in sides])
        left, right = zip(*found, strict=True)
        return torch.cat(left), torch.cat(right)

    def labels(self, step: int, part: slice) -> dict[str, Tensor]:
        """What the loss is told of a part of a step's pairs: labels or ids, by the name of its argument."""
        rows = self.members(step)[part]
        if self.config.loss == "supcon":
            return {"labels": self.data.train_labels[rows]}
        if self.config.ids and self.data.train_ids is not None:
            return {"ids": self.data.train_ids[rows]}
        return {}

    def _other_side(self, rows: Tensor) -> Tensor:
        others = self.data.train if self.data.train_partners is None else self.data.train_partners
        return others[rows if self._partners is None else self._partners[rows]]

    def _broken(self) -> Tensor | None:
        """For every input the row of its partner: another one's for a share of them, the same one throughout the run."""
        count = round(self.config.broken * len(self.rows))
        if not count:
            return None
        if count == 1:
            raise ValueError(
                f"broken={self.config.broken} of {len(self.rows)} pairs is one: it takes two to exchange partners."
            )
        draw = generator(self.config.seed, "broken")
        chosen = self.rows[torch.randperm(len(self.rows), generator=draw)[:count]]
        partners = torch.arange(len(self.data.train))
        partners[chosen] = chosen.roll(1)
        return partners


def generator(seed: int, stream: str, *index: int) -> torch.Generator:
    """A source of random numbers for one purpose at one place, independent of all others of the seed."""
    key = np.random.SeedSequence([seed, *index, len(index), *stream.encode()])
    return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
