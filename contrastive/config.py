"""What a run depends on, with the rule and the reason of every setting in one place: the command line is made of it."""

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CUSTOM", "TrainConfig", "from_file"]

CUSTOM = "custom"


def _setting(
    default: Any, text: str, *, why: str = "", lowest: float | None = None, above: bool = False, most: float = math.inf
):
    rule = {"text": text, "why": why, "lowest": lowest, "above": above, "most": most}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=rule)
    return field(default=default, metadata=rule)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; the text of a setting is what `contrastive train --help` says.

    Raises:
        ValueError: A field breaks its rule; the message says which, why and what to do.

    Example:
        >>> TrainConfig(epochs=0)
        Traceback (most recent call last):
        ValueError: epochs=0 must be an integer of at least 1: it counts passes over the data.
    """

    data: str = _setting(
        "digits", "digits, fashion-mnist, german-english, a folder of images, an .npy or .npz, or left.npy,right.npy."
    )
    loss: str = _setting(
        "infonce",
        "infonce, ntxent, clip, global, sinkhorn, unbalanced, or supcon, partial, double-bounded, rince, dcl, hard-negative.",
    )
    loss_options: dict[str, float] = _setting({}, "More of the loss, as rho=0.1,mass=1.")
    encoder: str = _setting(
        "auto", "auto, small-cnn, resnet18, mlp, ngrams, timm:NAME, or package.module:Name of your own."
    )
    epochs: int = _setting(20, "Passes over the training inputs.", lowest=1, why="it counts passes over the data")
    batch_size: int = _setting(
        256, "Pairs in a batch, over all processes.", lowest=2, why="an image alone in its batch has no negatives"
    )
    chunk: int = _setting(
        0, "Pairs the encoder sees at once (GradCache); 0 is the whole batch.", lowest=0, why="0 is the whole batch"
    )
    learning_rate: float = _setting(
        3e-3,
        "Peak of the one-cycle schedule.",
        lowest=0,
        above=True,
        why="with 0 nothing is learned and below 0 the loss is climbed; 1e-3 to 1e-2 suits small images",
    )
    weight_decay: float = _setting(
        1e-2,
        "Decay of the encoder's weights.",
        lowest=0,
        why="below 0 the weights are driven to infinity; 0 turns it off",
    )
    temperature: float = _setting(
        0.2,
        "Divides the cosine similarities.",
        lowest=0,
        above=True,
        why="it divides the cosine similarities; 0.05 to 0.5 is usual",
    )
    learn_temperature: bool = _setting(False, "Train the temperature too.")
    uniformity: float = _setting(
        0.0,
        "Weight of the uniformity penalty.",
        lowest=0,
        why="below 0 it would reward uneven negatives; 0 turns it off",
    )
    queue: int = _setting(
        0, "Earlier embeddings kept as negatives.", lowest=0, why="it counts embeddings; 0 keeps none"
    )
    ids: bool = _setting(True, "Tell the loss which pairs of a batch are one group, where the data say.")
    broken: float = _setting(
        0.0, "Share of the pairs that are given a wrong partner.", lowest=0, most=1, why="it is a share"
    )
    imbalance: float = _setting(
        1.0, "Largest class over smallest, for a long tail.", lowest=1, why="1 leaves the classes as they are"
    )
    train_size: int = _setting(0, "Use this many training inputs; 0 is all.", lowest=0, why="0 is all of them")
    augmentation: str = _setting("auto", "auto, affine, photo, noise or none.")
    image_size: int = _setting(
        32,
        "Side to which images of a folder are brought.",
        lowest=8,
        most=4096,
        why="smaller ones show nothing, and all images are held in memory",
    )
    dim: int = _setting(64, "Length of an embedding.", lowest=1, why="it is the length of an embedding")
    seed: int = _setting(
        0, "Seed of the weights, the order and the augmentation.", lowest=0, why="give any non-negative integer"
    )
    precision: str = _setting("32", "32, bf16 or 16, of the encoder; losses are float32.")
    device: str = _setting("auto", "auto, cpu or cuda.")
    threads: int = _setting(1, "CPU threads.", lowest=1, why="one is fastest for small images")
    save_every: int = _setting(
        0, "Steps between checkpoints; 0 is an epoch.", lowest=0, why="it counts steps; 0 is an epoch"
    )
    log_every: int = _setting(10, "Steps between log entries.", lowest=1, why="it counts steps")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            _check(setting, getattr(self, setting.name))
        if own := [name for name in self.loss_options if name in {setting.name for setting in dataclasses.fields(self)}]:
            raise ValueError(f"loss_options sets {', '.join(own)}, which is a setting of a run: give it as one.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}.")
        from contrastive.losses import KNOWN  # torch takes a second to import, which --help need not wait for
        from contrastive.views import RECIPES

        if self.augmentation not in RECIPES:
            raise ValueError(f"augmentation={self.augmentation!r} is not one of {', '.join(RECIPES)}.")
        if self.loss != CUSTOM and self.loss not in KNOWN:
            raise ValueError(
                f"loss={self.loss!r} is not a known loss: choose one of {', '.join(KNOWN)}; {CUSTOM} is your own."
            )

    def __hash__(self) -> int:
        return hash((type(self), *(str(value) for value in dataclasses.asdict(self).values())))


_CHOICES = {
    "precision": ("32", "bf16", "16"),
    "device": ("auto", "cpu", "cuda"),
}


def _check(setting: dataclasses.Field, value: Any) -> None:
    rule, name = setting.metadata, setting.name
    if setting.type is int:
        most = int(min(rule["most"], 2**63 - 1))
        if isinstance(value, bool) or not isinstance(value, int) or not rule["lowest"] <= value <= most:
            words = f" and at most {most}" if rule["most"] < math.inf or (isinstance(value, int) and value > most) else ""
            raise ValueError(f"{name}={value!r} must be an integer of at least {rule['lowest']:g}{words}: {rule['why']}.")
    elif setting.type is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or value < rule["lowest"] or value > rule["most"] or (rule["above"] and value == rule["lowest"]):
            words = f"above {rule['lowest']:g}" if rule["above"] else f"of at least {rule['lowest']:g}"
            words += f" and at most {rule['most']:g}" if rule["most"] < math.inf else ""
            raise ValueError(f"{name}={value!r} must be a finite number {words}: {rule['why']}.")
    elif setting.type is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false.")
    elif setting.type is str:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name}={value!r} must be a word, in a file with quotation marks.")
    elif not isinstance(value, dict) or not all(isinstance(x, int | float) for x in value.values()):
        raise ValueError(f"{name}={value!r} must be names with numbers, as rho=0.1,mass=1.")


def from_file(path: str | Path) -> dict[str, Any]:
    """Return the settings in a TOML or JSON file, a table of the fields of `TrainConfig`.

    Raises:
        ValueError: The file cannot be read, or holds a setting there is none of.
    """
    import json

    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"config={path} {what}: give a TOML file with settings such as epochs = 50.")
    try:
        if path.suffix == ".json":
            settings = json.loads(path.read_text())
        elif sys.version_info >= (3, 11):
            import tomllib

            settings = tomllib.loads(path.read_text())
        else:
            import tomli

            settings = tomli.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    known = {setting.name for setting in dataclasses.fields(TrainConfig)}
    if not isinstance(settings, dict) or (unknown := sorted(set(settings) - known)):
        named = ", ".join(unknown) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{path} sets {named}, which is no setting: `contrastive train --help` lists them.")
    return settings
