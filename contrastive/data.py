"""Data held in memory, split so that the test part is a real change of source: images, pairs of arrays, pairs of texts.

A name of `DATASETS`, or a path: a folder of images, one array (`.npy`, `.npz`), or two, `left.npy,right.npy`, whose rows are
pairs. Whatever is wrong with it is said in one sentence before anything is trained.
"""

import gzip
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contrastive.views import augment
from iotsolve.progress import bar

__all__ = ["DATASETS", "Dataset", "augment", "digits", "fashion_mnist", "from_arrays", "from_folder", "load"]


@dataclass(frozen=True)
class Dataset:
    """Inputs with what is known of them, already split.

    Args:
        train: Training inputs, shape (N, ...): images are float32, (N, channels, size, size), values in [0, 1]; texts are
            int64, (N, length), numbers of n-grams.
        train_labels: Class of each training input, int64, shape (N,), or None. Contrastive training looks at them only
            if the loss is told to.
        test: Test inputs, as `train`.
        test_labels: Class of each test input, or None.
        name: The name under which `load` knows the data.
        train_partners: What each training input is paired with, shape (N, ...); None where a pair is two views of one input.
        test_partners: The same for the test part.
        train_ids: Group of each training pair, int64, shape (N,): pairs of one group are each other's positives.
        test_ids: The same for the test part.
        train_rows: Place of each training input in what the data were made of, int64, shape (N,); None: there are only the parts.
        test_rows: The same for the test part.
        files: Names of the images, by place.
        classes: Names of the classes, by label.

    Raises:
        ValueError: A part is empty, lengths differ, or an input is NaN or infinite.
    """

    train: Tensor
    train_labels: Tensor | None
    test: Tensor
    test_labels: Tensor | None
    name: str
    train_partners: Tensor | None = None
    test_partners: Tensor | None = None
    train_ids: Tensor | None = None
    test_ids: Tensor | None = None
    train_rows: Tensor | None = None
    test_rows: Tensor | None = None
    files: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            inputs = getattr(self, part)
            if not len(inputs):
                raise ValueError(f"{self.name!r} has no {part} inputs: is the folder or the array empty, or the split?")
            for what in ("labels", "partners", "ids", "rows"):
                other = getattr(self, f"{part}_{what}")
                if other is not None and len(other) != len(inputs):
                    raise ValueError(
                        f"{self.name!r} has {len(inputs)} {part} inputs and {len(other)} {what}: row i of both must be of one "
                        "thing; was one of them cut or shuffled?"
                    )
            for values in (inputs, getattr(self, f"{part}_partners")):
                if values is not None:
                    _check_finite(values, f"{self.name!r} has {{}} {part} inputs")

    @property
    def is_paired(self) -> bool:
        """Whether a pair is two different things rather than two views of one."""
        return self.train_partners is not None

    @cached_property
    def fingerprint(self) -> str:
        """A number that other inputs, labels or another split would change."""
        told = hashlib.sha256()
        for part in ("train", "test"):
            for what in ("", "_partners", "_labels", "_ids"):
                values = getattr(self, part + what)
                told.update(repr(None if values is None else tuple(values.shape)).encode())
                if values is not None:
                    told.update(values.contiguous().numpy())
        return told.hexdigest()

    def first(self, count: int) -> "Dataset":
        """The same with the first `count` training inputs only."""
        if not 1 <= count <= len(self.train):
            raise ValueError(
                f"train_size={count}: {self.name!r} has {len(self.train)} training inputs; choose from 1 to that."
            )
        names = ("train", "train_labels", "train_partners", "train_ids", "train_rows")
        kept = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if x is None else x[:count] for name, x in kept.items()})


def digits() -> Dataset:
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
    return Dataset(images[:1200], classes[:1200], images[1200:], classes[1200:], name="digits")


# -- Fashion-MNIST -------------------------------------------------------------------------------------------------------


def fashion_mnist(folder: str | Path | None = None) -> Dataset:
    """Return Fashion-MNIST: 60,000 images of clothes to train, 10,000 to test, 28 x 28, ten classes (Xiao et al., 2017).

    Args:
        folder: Where the four files lie, as published, compressed or not. None looks in the folder that the environment
            variable FASHION_MNIST names, in Debian's package, and in the user's cache, and then downloads them there.

    Raises:
        ValueError: The files are not there, or their contents are not the published ones.
    """
    where = _fashion_folder() if folder is None else Path(folder)
    parts = []
    for part in ("train", "t10k"):
        images, labels = (_idx(where, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        parts += [torch.from_numpy(images).float().div(255).unsqueeze(1), torch.from_numpy(labels).long()]
    return Dataset(*parts, name="fashion-mnist")


_FASHION = {  # SHA-256 of what the published files hold
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FASHION_AT = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def _fashion_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "iotsolve" / "fashion-mnist"
    named = os.environ.get("FASHION_MNIST")
    for folder in [Path(named)] if named else [_DEBIAN_FASHION, cache]:
        if folder.is_dir() and all(_there(folder, name) for name in _FASHION):
            return folder
    how = (
        "install Debian's package dataset-fashion-mnist, or put the four published files into a folder and name it in the "
        "environment variable FASHION_MNIST"
    )
    if named:
        raise ValueError(f"FASHION_MNIST={named} does not hold the four files of Fashion-MNIST: {how}.")
    from urllib.error import URLError
    from urllib.request import urlopen

    for name in _FASHION:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with urlopen(f"{_FASHION_AT}/{name}.gz", timeout=20) as answer:
                content = answer.read()
        except (URLError, TimeoutError, OSError) as error:
            raise ValueError(
                f"Fashion-MNIST is not on this machine and could not be downloaded ({error}): {how}."
            ) from None
        (cache / f"{name}.gz.part").write_bytes(content)
        (cache / f"{name}.gz.part").replace(cache / f"{name}.gz")
    return cache


def _there(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """An array in the format of MNIST: two zeros, the type, the number of axes, the lengths, the values."""
    path = _there(folder, name)
    if path is None:
        raise ValueError(f"{folder} has no {name} or {name}.gz: give the folder with the four files of Fashion-MNIST.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}): get it again.") from error
    if hashlib.sha256(content).hexdigest() != _FASHION[name]:
        raise ValueError(f"{path} does not hold the published {name}: its checksum differs; get it again.")
    lengths = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(lengths).copy()


# -- the user's own ------------------------------------------------------------------------------------------------------


def from_arrays(
    x: NDArray,
    partners: NDArray | None = None,
    *,
    labels: NDArray | None = None,
    ids: NDArray | None = None,
    name: str = "arrays",
    test_share: float = 0.2,
    files: tuple[str, ...] | None = None,
) -> Dataset:
    """Return arrays as data, a part of them, drawn once and for all, held out as the test part.

    Args:
        x: Inputs, N >= 5 of them: vectors (N, D), or square images (N, H, W), (N, channels, H, W) or (N, H, W, channels).
            Integers from 0 to 255 (uint8) become numbers from 0 to 1.
        partners: What each input is paired with, as `x`; None for two views of one input.
        labels: Class of each input, shape (N,): whole numbers or strings.
        ids: Group of each pair, shape (N,): a group stays on one side of the split.
        name: What error messages call the data.
        test_share: Share of the inputs, or of the groups, that is held out, in (0, 1).
        files: Names of the inputs, which then decide who is held out: one more of them moves at most one other across.

    Raises:
        ValueError: Shapes disagree, or nothing is left of a part.

    Example:
        >>> data = from_arrays(np.zeros((10, 4)), np.ones((10, 3)))
        >>> tuple(data.train.shape), tuple(data.test_partners.shape)
        ((8, 4), (2, 3))
    """
    count = len(np.atleast_1d(x))
    for what, other in (("partners", partners), ("labels", labels), ("ids", ids)):
        if other is not None and len(np.atleast_1d(other)) != count:
            raise ValueError(
                f"{name!r} has {count} inputs and {len(np.atleast_1d(other))} {what}: row i of both must be of one thing."
            )
    x, partners = _inputs(x, name), None if partners is None else _inputs(partners, name)
    (classes, *label), (_, *id_) = (_coded(what, y, name) for what, y in (("labels", labels), ("ids", ids)))
    codes = [*label, *id_]
    groups = np.arange(len(x)) if ids is None else codes[1].numpy()
    count = int(groups.max(initial=-1)) + 1
    if count < 5:
        raise ValueError(
            f"{name!r} has {count} inputs (or groups of them): at least 5 are needed to train on some and test on others."
        )
    order = np.random.default_rng(0).permutation(count) if files is None else _by_name(files)
    held = np.zeros(count, bool)
    held[order[: max(1, round(test_share * count))]] = True
    test = torch.from_numpy(held[groups])

    def split(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if values is None else (values[~test], values[test])

    pairs = map(split, (x, partners, *codes, torch.arange(len(x))))
    (own, own_test), (other, other_test), (label, label_test), (group, group_test), rows = pairs
    given = own, label, own_test, label_test, name, other, other_test, group, group_test, *rows
    return Dataset(*given, files=files, classes=classes)


def _by_name(files: tuple[str, ...]) -> NDArray[np.int64]:
    """An order that more or fewer files hardly change: who is at the front stays there."""
    return np.argsort([hashlib.sha256(file.encode(errors="surrogateescape")).hexdigest() for file in files], kind="stable")


def _coded(what: str, values: NDArray | None, name: str) -> tuple[tuple[str, ...] | None, Tensor | None]:
    """Names in order, and the number of each value's."""
    if values is None:
        return None, None
    values = np.asarray(values)
    whole = values.dtype.kind in "biuUS" or (values.dtype.kind == "f" and bool((values % 1 == 0).all()))
    if values.ndim != 1 or not whole:
        raise ValueError(
            f"{name!r} has {what} of shape {values.shape} and type {values.dtype}: must be (N,) whole numbers or strings, one of "
            "each input; are they scores, or one-hot? argmax(1) of those would do."
        )
    names, codes = np.unique(values, return_inverse=True)
    return tuple(map(str, names)), torch.from_numpy(codes).long()


def from_folder(folder: str | Path, *, size: int = 32) -> Dataset:
    """Return a folder of images as data: cut to their central square, brought to one size, in colour if any has some.

    Args:
        folder: Subfolders are classes; without them there are no labels. Subfolders `train` and `test` (or `val`, if there is no
            `test`) are the split, each with classes or without; else a fifth of the images is held out. Links are followed.
        size: Side of the images in pixels.

    Raises:
        ValueError: There is no such folder, it holds no image or nothing but `train`, or a file cannot be read as an image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: give one with images, or with a subfolder of images for every class."
        )
    subfolders = {path.name for path in folder.iterdir() if path.is_dir()}
    if subfolders == {"train"}:
        raise ValueError(
            f"{folder} has a subfolder train and no test or val to hold out: add one, or give {folder / 'train'}, a fifth of "
            "which is then held out."
        )
    held = "test" if "test" in subfolders else "val"
    if not {"train", held} <= subfolders:
        images, labels, files = _read_folder(folder, size)
        return from_arrays(images, labels=labels, name=str(folder), files=files)
    (train, train_labels, own), (test, test_labels, others) = (
        _read_folder(folder / half, size) for half in ("train", held)
    )
    if train.shape[1] != test.shape[1]:
        train, test = (np.repeat(x, 3, axis=1) if x.shape[1] == 1 else x for x in (train, test))
    classes = codes = None
    if train_labels is not None and test_labels is not None:
        classes, codes = _coded("labels", np.concatenate([train_labels, test_labels]), str(folder))
    parts = (None, None) if codes is None else codes.split([len(train), len(test)])
    rows = torch.arange(len(train) + len(test)).split([len(train), len(test)])
    files = tuple(f"train/{file}" for file in own) + tuple(f"{held}/{file}" for file in others)
    made = (_inputs(x, str(folder)) for x in (train, test))
    return Dataset(
        next(made),
        parts[0],
        next(made),
        parts[1],
        str(folder),
        train_rows=rows[0],
        test_rows=rows[1],
        files=files,
        classes=classes,
    )


_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def _read_folder(folder: Path, size: int) -> tuple[NDArray[np.uint8], NDArray | None, tuple[str, ...]]:
    """Images, the names of their classes, and their own."""
    from PIL import Image, UnidentifiedImageError

    paths = sorted(path for path in _files(folder) if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(_SUFFIXES)}): is it the right folder?")
    pictures = []
    with bar("reading images", len(paths)) as advance:
        for path in paths:
            try:
                with Image.open(path) as image:
                    pictures.append(_picture(image, size))
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(
                    f"{path} cannot be read as an image ({error}): repair it or take it out of the folder."
                ) from error
            advance("")
    coloured = any(picture.shape[2] == 3 for picture in pictures)
    pictures = [np.repeat(x, 3, axis=2) if coloured and x.shape[2] == 1 else x for x in pictures]
    classes = [path.relative_to(folder).parts[0] if path.parent != folder else None for path in paths]
    labels = None if None in classes else np.array(classes)
    return (
        np.stack(pictures).transpose(0, 3, 1, 2),
        labels,
        tuple(path.relative_to(folder).as_posix() for path in paths),
    )


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files below a folder, behind links too, unless they lead back up."""
    here = folder.resolve()
    if here not in above:
        for path in folder.iterdir():
            if path.is_dir():
                yield from _files(path, (*above, here))
            else:
                yield path


def _picture(image: Any, size: int) -> NDArray[np.uint8]:
    """The central square of an image at a size, (size, size, 1 or 3); of 16 bit, which Pillow cuts off, the upper byte."""
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: greys of 32 bit have no known white; save them with 8 or 16")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, -1)


def _inputs(x: NDArray, name: str) -> Tensor:
    """Vectors or images of one convention, float32."""
    x = np.asarray(x)
    if x.dtype == object or x.dtype.kind not in "buif":
        raise ValueError(f"{name!r} holds values of type {x.dtype}: numbers are needed, one row for each input.")
    if x.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name!r} has shape {x.shape}: vectors are (N, D), images (N, H, W), (N, channels, H, W) or (N, H, W, channels)."
        )
    if not np.prod(x.shape[1:]):
        raise ValueError(f"{name!r} has shape {x.shape}: an input without a single value tells nothing.")
    with np.errstate(over="ignore"):  # it is said below
        values = torch.from_numpy(x.astype(np.float32)).div(255.0 if x.dtype == np.uint8 else 1.0)
    if values.ndim == 3:
        values = values.unsqueeze(1)
    if values.ndim == 4 and values.shape[1] not in (1, 2, 3, 4) and values.shape[-1] in (1, 2, 3, 4):
        values = values.permute(0, 3, 1, 2).contiguous()
    if values.ndim == 4 and values.shape[2] != values.shape[3]:
        raise ValueError(
            f"{name!r} has images of {values.shape[2]} x {values.shape[3]} pixels: make them square first."
        )
    _check_finite(values, f"{name!r} has {{}} inputs")
    return values


def _check_finite(values: Tensor, words: str) -> None:
    if values.is_floating_point() and not values.isfinite().all():
        bad = (~values.flatten(1).isfinite().all(1)).nonzero()[:, 0]
        raise ValueError(
            f"{words.format(len(bad))} with NaN or infinite values, the first in row {int(bad[0])}: remove or repair them; a "
            "loss would be NaN from the first batch on. Numbers above 3e38 are infinite in float32, and must be rescaled."
        )


_KEYS = {
    "x": "x, or left for pairs",
    "labels": "classes",
    "right": "partners of left",
    "ids": "groups of pairs",
}


def _array(path: Path) -> Any:
    """The array in a file, or of an archive all by name."""
    try:
        found = np.load(path, allow_pickle=False)
        if path.suffix == ".npy":
            return found
        with found:
            return {key: found[key] for key in found.files}
    except (ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:  # what NumPy says of pickles and all else
        raise ValueError(
            f"{path} holds no whole arrays of numbers or strings saved by NumPy: save them with numpy.save or savez, without "
            "Python objects, or copy the file again if it was cut."
        ) from error


def _from_npz(path: Path) -> Dataset:
    arrays = _array(path)
    one = next((key for key in ("x", "left", "images") if key in arrays), None)
    if one is None:
        known = "; ".join(f"{key}: {what}" for key, what in _KEYS.items())
        raise ValueError(
            f"{path} holds {', '.join(arrays) or 'nothing'}: expected {known}; or two files, left.npy,right.npy."
        )
    unknown = set(arrays) - {one, "labels", "right", "ids"}
    if unknown:
        raise ValueError(
            f"{path} holds {', '.join(sorted(unknown))}, which nothing is known of: expected {', '.join(_KEYS)}."
        )
    return from_arrays(
        arrays[one], arrays.get("right"), labels=arrays.get("labels"), ids=arrays.get("ids"), name=str(path)
    )


def _german_english() -> Dataset:
    from contrastive.text import german_english

    return german_english()


DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "german-english": _german_english,
}


def load(name: str, *, image_size: int = 32) -> Dataset:
    """Return the data called `name`.

    Args:
        name: A key of `DATASETS`, or a path: a folder of images, an array in `.npy` or `.npz` (with the keys x and labels, or
            left, right and ids), or two arrays of pairs as `left.npy,right.npy`.
        image_size: Side to which the images of a folder are brought, in pixels.

    Raises:
        ValueError: There is no such data, or something is wrong with them.
    """
    if name in DATASETS:
        return DATASETS[name]()
    parts = [Path(part.strip()) for part in name.split(",")]
    missing = [str(part) for part in parts if not part.exists()]
    if missing:
        known = ", ".join(sorted(DATASETS))
        raise ValueError(
            f"data={name!r} is not a known data set: choose one of {known}, or an existing path (there is no {missing[0]}). "
            "Data that were given to train() in Python are known there only: resume and score the run there, with the same data."
        )
    if len(parts) == 1 and parts[0].is_dir():
        return from_folder(parts[0], size=image_size)
    try:
        if len(parts) == 1 and parts[0].suffix == ".npz":
            return _from_npz(parts[0])
        if len(parts) <= 2 and all(part.suffix == ".npy" for part in parts):
            return from_arrays(*map(_array, parts), name=name)
    except (OSError, EOFError, KeyError) as error:
        raise ValueError(f"{name} cannot be read ({error}): is it an array saved by NumPy?") from error
    raise ValueError(
        f"data={name!r}: a folder of images, one .npy or .npz, or two .npy files with a comma between them."
    )


def tail(labels: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """Rows that leave a long tail: the k-th of K classes keeps `ratio ** (-k / (K - 1))` of its inputs, at least one.

    Args:
        labels: Class of each input, shape (N,).
        ratio: Size of the largest class over that of the smallest, at least 1.
        generator: Draws which inputs stay.

    Returns:
        Their rows, in order, int64.
    """
    classes = labels.unique()
    kept = []
    for place, label in enumerate(classes):
        own = (labels == label).nonzero()[:, 0]
        count = max(1, round(len(own) * ratio ** (-place / max(1, len(classes) - 1))))
        kept.append(own[torch.randperm(len(own), generator=generator)[:count]])
    return torch.cat(kept).sort().values


def blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, slice]]:
    """Which blocks of `size` the range meets, and what of each."""
    for block in range(start // size, -(-stop // size)):
        first = block * size
        yield block, slice(max(start, first) - first, min(stop, first + size) - first)
