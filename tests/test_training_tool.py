"""What a practitioner does with the trainer: own data, large batches, many processes, kills, full disks, pages about runs."""

import dataclasses
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from contrastive import encoders, experiment, trainer
from contrastive.batches import Batches
from contrastive.cli import app
from contrastive.config import TrainConfig, from_file
from contrastive.data import Dataset, digits, fashion_mnist, from_arrays, from_folder, load, tail
from contrastive.evaluate import evaluate, probe, probing, recall
from contrastive.losses import KNOWN, make
from contrastive.report import write
from contrastive.text import german_english, ngrams
from contrastive.trainer import initial_model, load_run, train

SHORT = TrainConfig(loss="clip", epochs=2, batch_size=300, augmentation="affine", log_every=1)


class Dropping(encoders.SmallCNN):
    """An encoder that draws random numbers at every step, given by its import path."""

    def __init__(self, dim):
        super().__init__(1, 8, dim=dim)
        self.head = nn.Sequential(nn.Dropout(0.2), self.head)


DROPPING = f"{__name__}:Dropping"


def state(run):
    return torch.load(run.out / "last.ckpt", weights_only=True)["state_dict"]


def assert_same(left, right, **near):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **({"rtol": 0, "atol": 0} | near))


# -- resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"queue": 500, "loss": "infonce"},
        {"encoder": DROPPING, "chunk": 128},
        {"loss": "unbalanced", "learn_temperature": True, "broken": 0.5},
        {"precision": "bf16", "loss": "supcon"},
    ],
    ids=["queue", "dropout-in-parts", "temperature", "bf16"],
)
@pytest.mark.parametrize("step", [1, 6])
def test_stopped_anywhere_and_resumed_is_bitwise_the_whole(settings, step, tmp_path, monkeypatch):
    config = dataclasses.replace(SHORT, log_every=1, **settings)
    whole = train(config, tmp_path / "whole")
    step_taken, count = torch.optim.AdamW.step, []

    def until(self, *given, **more):
        count.append(1)
        if len(count) > step:
            raise KeyboardInterrupt
        return step_taken(self, *given, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", until)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step (0|{step - step % 4}) of 8"):
        train(config, tmp_path / "cut")  # the optimiser was at work: the last checkpoint is an epoch's
    monkeypatch.undo()
    resumed = train(dataclasses.replace(config, save_every=3), tmp_path / "cut", resume=True)
    assert_same(state(resumed), state(whole))
    assert resumed.history == whole.history
    assert (resumed.out / "metrics.csv").read_text() == (whole.out / "metrics.csv").read_text()
    steps = [row.split(",")[0] for row in (resumed.out / "speed.csv").read_text().splitlines()]
    assert steps == ["step", *map(str, range(1, 9))]


def test_checkpoints_between_epochs_are_whole_runs_to_go_on_from(tmp_path, monkeypatch):
    config = dataclasses.replace(SHORT, save_every=1)
    whole = train(config, tmp_path / "whole")
    saved, kept = trainer.write_atomically, []

    def killed(path, content):
        saved(path, content)
        if path.name == "last.ckpt":
            kept.append(path)
            if len(kept) == 4:  # the start and three steps
                raise SystemExit

    monkeypatch.setattr("contrastive.fitting.write_atomically", killed)
    with pytest.raises(SystemExit):
        train(config, tmp_path / "cut")
    monkeypatch.undo()
    assert load_run(tmp_path / "cut").steps == 3
    assert_same(state(train(config, tmp_path / "cut", resume=True)), state(whole))


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    config, data = dataclasses.replace(SHORT, loss="custom", epochs=1), digits()
    refused = []

    class Nosy(nn.Module):
        def forward(self, z0, z1):
            if not refused:
                with pytest.raises(ValueError, match="is being trained by another process") as error:
                    train(config, tmp_path / "run", criterion=Nosy(), data=data, resume=True, progress=False)
                refused.append(error)
            return -(z0 * z1).sum() / len(z0)

    train(config, tmp_path / "run", data=data, criterion=Nosy(), progress=False)
    assert refused


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    import errno

    def none(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(trainer.fcntl, "flock", none)
    assert train(dataclasses.replace(SHORT, epochs=1), tmp_path / "run", progress=False).epochs == 1


def test_a_full_disk_is_one_sentence_wherever_it_is_met(tmp_path, monkeypatch):
    import errno

    import contrastive.evaluate

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "z.npz"))

    train(SHORT, tmp_path / "run", progress=False)
    monkeypatch.setattr(contrastive.evaluate, "save_embeddings", full)
    assert_one_sentence(
        command("embed", tmp_path / "run", "--out", tmp_path / "z.npz"), r"no space left .*z\.npz.*make room"
    )


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(1)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left for .*last.ckpt.*what it held before is kept"):
        train(dataclasses.replace(SHORT, save_every=1), tmp_path / "run")
    monkeypatch.undo()
    run = load_run(tmp_path / "run")
    assert run.steps == 1 and not list(run.out.glob("*.tmp"))
    assert train(dataclasses.replace(SHORT, save_every=1), tmp_path / "run", resume=True).steps == 8


# -- the step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["infonce", "sinkhorn", "supcon"])
def test_a_batch_in_parts_is_the_batch(loss, tmp_path):
    config = dataclasses.replace(SHORT, loss=loss, epochs=1, learn_temperature=loss == "infonce")
    whole = train(config, tmp_path / "whole")
    parts = train(dataclasses.replace(config, chunk=70), tmp_path / "parts")  # the last part has 20
    np.testing.assert_allclose(parts.history, whole.history, rtol=2e-5)
    assert_same(state(parts), state(whole), rtol=1e-3, atol=2e-4)  # Adam divides small gradients by themselves


def test_the_first_gradient_of_parts_is_that_of_autograd(tmp_path, monkeypatch):
    """By a loop that shares nothing with the trainer's: one graph through encoder and loss."""
    config = dataclasses.replace(SHORT, loss="sinkhorn", epochs=1, chunk=77)
    seen = {}

    def caught(self, *given, **more):
        seen.update(
            {id(p): p.grad.clone() for group in self.param_groups for p in group["params"]},
            order=self.param_groups[0]["params"],
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", caught)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    data = digits()
    model = initial_model(config, data)
    make("sinkhorn", temperature=0.2)(*model(*Batches(config, data).views(0))).backward()
    for ours, p in zip(seen["order"], model.parameters(), strict=True):
        torch.testing.assert_close(seen[id(ours)], p.grad, rtol=1e-4, atol=1e-7)


def test_what_is_logged(tmp_path):
    run = train(dataclasses.replace(SHORT, loss="sinkhorn"), tmp_path / "run")
    table = np.genfromtxt(run.out / "metrics.csv", delimiter=",", names=True)
    np.testing.assert_allclose(table["loss_minus_ln_n"], table["loss"] - np.log(300), atol=1e-5)
    assert (table["marginal_error"] < 1e-2).all()
    speed = np.genfromtxt(run.out / "speed.csv", delimiter=",", names=True)
    shares = sum(speed[part] for part in ("data", "encoder", "loss", "optimizer"))
    np.testing.assert_allclose(shares, 1, atol=3e-3)


def test_a_loss_that_refuses_its_queue_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="with a queue: its features are nobody's positives"):
        train(dataclasses.replace(SHORT, loss="sinkhorn", queue=100), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [*KNOWN])
def test_every_loss_the_command_line_knows_trains(name, tmp_path):
    run = train(TrainConfig(loss=name, epochs=1, batch_size=200, train_size=400), tmp_path / "run")
    assert np.isfinite(run.history).all()


RANKS = """
import sys
from pathlib import Path
from contrastive.trainer import TrainConfig, train
config = TrainConfig(**eval(sys.argv[2]))
train(config, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"loss": "sinkhorn", "learn_temperature": True}, {"loss": "infonce", "queue": 400, "chunk": 80}],
    ids=["plain", "queue-parts"],
)
def test_two_processes_are_one(settings, tmp_path):
    given = {"epochs": 1, "batch_size": 300, "log_every": 1, **settings}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [
        os.environ
        | {
            "RANK": str(k),
            "LOCAL_RANK": str(k),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_WORLD_SIZE": "1",
            "GROUP_RANK": "0",
        }
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
        for k in range(2)
    ]
    words = [sys.executable, "-c", RANKS, str(tmp_path / "two"), repr(given)]
    ranks = [subprocess.Popen(words, env=place, stderr=subprocess.PIPE, text=True) for place in places]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    two, one = load_run(tmp_path / "two"), train(TrainConfig(**given), tmp_path / "one")
    np.testing.assert_allclose(two.history, one.history, rtol=2e-5)
    assert_same(state(two), state(one), rtol=1e-3, atol=2e-4)


# -- data ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(15):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "pictures" / name / f"{k}.png")
    return tmp_path / "pictures"


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def assert_one_sentence(result, words, *, code=2):
    assert result.exit_code == code, result.output
    assert re.search(words, result.stderr) and "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_four_commands_on_a_folder_of_images(folder, tmp_path):
    out = tmp_path / "run"
    first = command("train", "--data", folder, "--out", out, "--epochs", 1, "--batch-size", 5, "--image-size", 16)
    assert first.exit_code == 0, first.output
    assert command("train", "--out", out, "--resume").exit_code == 0
    scored = command("evaluate", out, "--layer", "features")
    assert scored.exit_code == 0 and "R@10" in scored.stdout, scored.output
    for suffix in (".npz", ".safetensors"):
        written = command("embed", out, "--out", tmp_path / f"e{suffix}")
        assert written.exit_code == 0 and "train (24, 64)" in written.stdout, written.output
    from safetensors.numpy import load_file

    arrays, same = np.load(tmp_path / "e.npz"), load_file(tmp_path / "e.safetensors")
    told = {"train", "test", "train_labels", "test_labels", "train_rows", "test_rows"}
    assert set(arrays) == told | {"files", "classes"} and set(same) == told
    np.testing.assert_array_equal(arrays["test"], same["test"])
    assert sorted([*arrays["train_rows"], *arrays["test_rows"]]) == list(range(30))
    model = load_run(out).encoder
    for row, label, found in zip(arrays["test_rows"], arrays["test_labels"], arrays["test"], strict=True):
        file = arrays["files"][row]
        assert file.split("/")[0] == arrays["classes"][label]
        (tmp_path / "one" / "of").mkdir(parents=True, exist_ok=True)
        for k in range(5):
            shutil.copy(folder / file, tmp_path / "one" / "of" / f"{k}.png")
        with torch.no_grad():
            np.testing.assert_allclose(model(from_folder(tmp_path / "one", size=16).test)[0], found, atol=1e-5)
    assert not list(tmp_path.glob("*.tmp*"))


def test_two_arrays_are_pairs(tmp_path):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(600, 5))
    np.save(tmp_path / "left.npy", hidden @ rng.normal(size=(5, 12)))
    np.save(tmp_path / "right.npy", hidden @ rng.normal(size=(5, 20)))
    given = f"{tmp_path / 'left.npy'},{tmp_path / 'right.npy'}"
    out = tmp_path / "run"
    result = command(
        "train", "--data", given, "--out", out, "--loss", "clip", "--epochs", 30, "--batch-size", 120, "--dim", 8
    )
    assert result.exit_code == 0, result.output
    assert command("evaluate", out).exit_code == 0
    scores = json.loads((out / "evaluation.json").read_text())["scores"]
    assert scores["trained"]["R@10 back"] > 0.5 > scores["untrained"]["R@10 back"]
    assert "raw inputs" not in scores  # the sides have no space in common


def test_what_is_wrong_with_data_is_one_sentence(folder, tmp_path):
    out = tmp_path / "run"

    def trained(data, *more):
        return command("train", "--data", data, "--out", out, "--epochs", 1, *more)

    assert_one_sentence(trained(tmp_path / "nowhere"), "is not a known data set: choose one of digits, fashion-mnist")
    (tmp_path / "empty").mkdir()
    assert_one_sentence(trained(tmp_path / "empty"), "empty holds no images")
    assert_one_sentence(trained(folder), "batch_size=256 exceeds the 24 training inputs")
    (folder / "cats" / "broken.png").write_bytes(b"no picture")
    assert_one_sentence(trained(folder), r"broken\.png cannot be read as an image")
    values = np.ones((50, 4))
    values[7, 1] = np.nan
    np.save(tmp_path / "nan.npy", values)
    assert_one_sentence(trained(tmp_path / "nan.npy"), "1 inputs with NaN or infinite values, the first in row 7:")
    np.save(tmp_path / "large.npy", np.full((50, 4), 1e39))
    assert_one_sentence(trained(tmp_path / "large.npy"), "50 inputs .* above 3e38 are infinite in float32")
    np.save(tmp_path / "bare.npy", np.ones((50, 0)))
    assert_one_sentence(trained(tmp_path / "bare.npy"), r"bare.npy' has shape \(50, 0\)")
    np.savez(tmp_path / "objects.npz", x=np.ones((50, 3)), labels=np.array([None] * 50))
    assert_one_sentence(trained(tmp_path / "objects.npz"), "objects.npz holds no whole arrays .* without Python objects")
    np.savez(tmp_path / "cut.npz", x=np.ones((50, 3)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:700])
    assert_one_sentence(trained(tmp_path / "cut.npz"), "cut.npz holds no whole arrays .* if it was cut")
    np.save(tmp_path / "short.npy", np.ones((40, 4)))
    assert_one_sentence(trained(f"{tmp_path / 'nan.npy'},{tmp_path / 'short.npy'}"), "50 inputs and 40 partners")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    assert_one_sentence(trained(tmp_path / "words.npy"), "numbers are needed")
    (tmp_path / "not.npy").write_text("no array")
    assert_one_sentence(trained(tmp_path / "not.npy"), "not.npy")
    np.savez(tmp_path / "odd.npz", picture=np.ones(3))
    assert_one_sentence(trained(tmp_path / "odd.npz"), "odd.npz holds picture: expected x")
    for strange in (np.linspace(0, 1, 50), np.eye(50)[:, :3]):
        np.savez(tmp_path / "strange.npz", x=np.ones((50, 3)), labels=strange)
        assert_one_sentence(
            trained(tmp_path / "strange.npz"), "labels of shape .* must be .N,. whole numbers or strings"
        )
    np.save(tmp_path / "wide.npy", np.ones((9, 3, 4, 5)))
    assert_one_sentence(trained(tmp_path / "wide.npy"), "make them square")
    np.savez(tmp_path / "one.npz", x=np.random.default_rng(0).random((60, 3)), labels=np.zeros(60))
    assert trained(tmp_path / "one.npz", "--batch-size", 20).exit_code == 0
    assert_one_sentence(command("evaluate", out), "one class only")
    assert_one_sentence(
        command("evaluate", out, "--data", "digits"),
        r"trained on inputs of shape \[\[3\]\].*'digits' has \[\[1, 8, 8\]\]",
    )
    assert_one_sentence(command("evaluate", out, "--layer", "last"), "layer='last' is not one of embedding, features")
    assert_one_sentence(command("embed", out, "--out", tmp_path / "e.csv"), r"must end in \.npz or \.safetensors")


def test_a_folder_with_its_own_split_and_grey_images(tmp_path):
    from PIL import Image

    for part, count in (("train", 6), ("test", 3)):
        (tmp_path / part).mkdir()
        for k in range(count):
            Image.new("L", (9, 12), 10 * k).save(tmp_path / part / f"{k}.jpg")
    data = from_folder(tmp_path, size=8)
    assert data.train.shape == (6, 1, 8, 8) and data.test.shape == (3, 1, 8, 8) and data.train_labels is None
    assert data.train[5].mean() == pytest.approx(50 / 255, abs=0.01)


def test_images_of_16_bit_keep_their_greys(tmp_path):
    from PIL import Image

    deep = np.random.default_rng(0).integers(20_000, 40_000, (6, 8, 8)).astype(np.uint16)
    for k, image in enumerate(deep):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    data = from_folder(tmp_path, size=8)
    found = torch.cat([data.train, data.test])[torch.cat([data.train_rows, data.test_rows]).argsort(), 0]
    np.testing.assert_allclose(found.numpy(), deep / 65_535, atol=1 / 255)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "real.tif")
    with pytest.raises(ValueError, match=r"real\.tif cannot be read as an image \(mode F: greys of 32 bit"):
        from_folder(tmp_path)


def test_folders_as_they_come(tmp_path):
    from PIL import Image

    def pictures(where, count, grey):
        where.mkdir(parents=True)
        for k in range(count):
            Image.new("L", (9, 9), grey + k).save(where / f"{k}.png")

    pictures(tmp_path / "elsewhere", 6, 100)
    pictures(tmp_path / "classes" / "one", 6, 0)
    (tmp_path / "classes" / "two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "classes" / "one" / "back").symlink_to(tmp_path / "classes")  # ends
    os.rename(tmp_path / "elsewhere" / "0.png", os.fsencode(tmp_path / "elsewhere") + b"/\xff.png")  # a name in Latin-1
    data = from_folder(tmp_path / "classes", size=8)
    assert data.classes == ("one", "two") and len(data.train) + len(data.test) == 12

    pictures(tmp_path / "split" / "train" / "one", 5, 0)
    with pytest.raises(ValueError, match="split has a subfolder train and no test or val to hold out"):
        from_folder(tmp_path / "split", size=8)
    pictures(tmp_path / "split" / "val" / "one", 3, 50)
    data = from_folder(tmp_path / "split", size=8)
    assert data.classes == ("one",) and len(data.train) == 5 and data.files[-1] == "val/one/2.png"
    torch.testing.assert_close(data.test[:, 0, 0, 0] * 255, torch.tensor([50.0, 51.0, 52.0]))

    Image.new("1", (20000, 10000)).save(tmp_path / "split" / "val" / "one" / "vast.png")
    with pytest.raises(ValueError, match=r"vast\.png cannot be read as an image .*limit"):
        from_folder(tmp_path / "split", size=8)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--loss-options", "temperature=1"), "loss_options sets temperature, which is a setting of a run"),
        (("--loss-options", "learn_temperature=1"), "loss_options sets learn_temperature"),
        (("--loss", "unbalanced", "--loss-options", "rho=1,rho=2"), "names with numbers, each name once"),
        (("--encoder", "os:path"), "encoder='os:path' is of type module, which cannot be called"),
        (("--seed", 2**63), "seed=9223372036854775808 must be an integer of at least 0 and at most 9223372036854775807"),
        (("--image-size", 100_000), "image_size=100000 must be .* at most 4096: .* held in memory"),
        (("--dim", 10**15), "not enough memory .*--chunk.*--dim"),
        (("--config", "list.toml"), r"data=\['a'\] must be a word"),
        (("--config", "bare.toml"), "precision=32 must be a word, in a file with quotation marks"),
    ],
)
def test_what_is_wrong_with_a_setting_is_one_sentence(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.toml").write_text("data = ['a']")
    (tmp_path / "bare.toml").write_text("precision = 32")
    assert_one_sentence(command("train", "--out", tmp_path / "run", "--epochs", 1, *words), said)


def test_whole_numbers_among_the_options_of_a_loss_stay_whole(tmp_path):
    given = "--loss", "sinkhorn", "--loss-options", "max_steps=7,tolerance=0.01"
    result = command("train", "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 400, *given)
    assert result.exit_code == 0, result.output
    assert trainer.load_config(tmp_path / "run").loss_options == {"max_steps": 7, "tolerance": 0.01}


def test_scores_are_shown_where_they_cannot_be_written(tmp_path, monkeypatch):
    train(SHORT, tmp_path / "run", progress=False)

    def read_only(path, content):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(trainer, "write_atomically", read_only)
    result = command("evaluate", tmp_path / "run")
    assert "R@10" in result.stdout
    assert_one_sentence(result, r"contrastive: .*evaluation\.json: Read-only file system$")


def test_a_run_that_begins_and_ends_while_another_starts_is_kept(tmp_path, monkeypatch):
    """As two jobs of an array with one --out do, of which one is slow to import."""
    alone = trainer._alone

    def late(out):
        monkeypatch.undo()
        train(SHORT, out, progress=False)
        return alone(out)

    monkeypatch.setattr(trainer, "_alone", late)
    with pytest.raises(ValueError, match="already holds a run, which is kept"):
        train(dataclasses.replace(SHORT, seed=5), tmp_path / "run", progress=False)
    assert trainer.load_config(tmp_path / "run") == SHORT


def test_a_run_whose_checkpoint_is_gone_does_not_begin_anew(tmp_path):
    out = tmp_path / "run"
    train(SHORT, out, progress=False)
    kept = (out / "metrics.csv").read_bytes()
    (out / "last.ckpt").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"has a metrics\.csv and no last\.ckpt, which was there.*Put it back"):
        train(SHORT, out, resume=True, progress=False)
    assert (out / "metrics.csv").read_bytes() == kept
    (tmp_path / "elsewhere").rename(out / "last.ckpt")
    train(SHORT, out, resume=True, progress=False)


def test_a_full_disk_is_told_by_the_command_with_what_was_kept(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = command("train", "--out", tmp_path / "run", "--epochs", 1)
    assert_one_sentence(result, r"no space left for .*config\.json .*: nothing was written; make room and run it again")


def test_a_new_image_moves_at_most_one_other_across_the_split(folder):
    from PIL import Image

    def held():
        data = from_folder(folder, size=8)
        return {data.files[row] for row in data.test_rows}

    before = held()
    for k in range(8):
        Image.new("RGB", (9, 9), (k, 0, 0)).save(folder / "cats" / f"new{k}.png")
        after = held()
        assert len((before ^ after) - {f"cats/new{k}.png"}) <= 1
        before = after


def test_data_that_changed_since_are_refused_unless_named(folder, tmp_path, monkeypatch):
    from PIL import Image

    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    words = ("--epochs", 1, "--batch-size", 5, "--image-size", 8)
    assert command("train", "--data", "pictures", "--out", out, *words).exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the run knows where its data are
    assert command("train", "--out", out, "--resume").exit_code == 0
    Image.new("RGB", (9, 9)).save(folder / "cats" / "new.png")
    assert_one_sentence(command("train", "--out", out, "--resume"), "is not what the run in .* was started with")
    for use in (("evaluate", out), ("embed", out, "--out", tmp_path / "e.npz")):
        assert_one_sentence(command(*use), "is not what the run in .* was started with")
        assert command(*use, "--data", folder).exit_code == 0
    with pytest.raises(ValueError, match="is not what the run"):
        load_run(out)


def test_classes_that_were_never_trained_on_are_said(tmp_path):
    rng = np.random.default_rng(0)
    data = Dataset(
        torch.rand(20, 3), torch.arange(20) % 2, torch.rand(9, 3), torch.from_numpy(rng.permutation(9) % 3), "strange"
    )
    with pytest.warns(
        RuntimeWarning, match="3 of the 9 test inputs of 'strange' are of classes without a training input"
    ):
        evaluate(nn.Flatten(), data)


def test_groups_stay_on_one_side_of_the_split():
    ids = np.repeat(np.arange(40), 3)
    data = from_arrays(np.arange(120.0)[:, None], np.arange(120.0)[:, None], ids=ids)
    assert not set(data.train_ids.tolist()) & set(data.test_ids.tolist()) and len(data.test) == 24
    torch.testing.assert_close(data.train, data.train_partners)


def test_broken_pairs_are_that_many_and_stay_so():
    data = digits()
    config = dataclasses.replace(SHORT, broken=0.5, augmentation="none", batch_size=1200)
    batches = Batches(config, data)
    for step in (0, 1):
        left, right = batches.views(step)
        off = (left != right).flatten(1).any(1)
        assert int(off.sum()) == 600
        members = batches.members(step)
        mine = {
            int(row): int((data.train == x).flatten(1).all(1).nonzero()[0])
            for row, x in zip(members[off][:20], right[off][:20], strict=True)
        }
        if step == 0:
            before = mine
        assert all(mine[row] == other for row, other in before.items() if row in mine)


def test_a_long_tail_has_its_ratio():
    labels = torch.arange(10).repeat(200)
    rows = tail(labels, 100.0, torch.Generator().manual_seed(0))
    counts = labels[rows].bincount()
    assert counts[0] == 200 and counts[-1] == 2 and (counts[:-1] >= counts[1:]).all()
    assert len(rows.unique()) == len(rows)


def test_pairs_of_a_group_meet_in_a_batch():
    ids = torch.arange(200).repeat_interleave(4)
    x = torch.randn(800, 3)
    data = Dataset(x, None, x, None, "pairs", x, x, ids, ids + 800)
    batches = Batches(dataclasses.replace(SHORT, batch_size=100, augmentation="auto"), data)
    groups = ids[batches.members(3)]
    assert len(groups.unique()) == 25
    assert torch.equal(batches.labels(3, slice(0, 100))["ids"], groups)
    assert (
        Batches(dataclasses.replace(SHORT, batch_size=100, augmentation="auto", ids=False), data).labels(
            3, slice(0, 100)
        )
        == {}
    )


def test_ngrams_are_what_they_are_called():
    codes = ngrams(["abc", "", "abc abc"], sizes=(3,))
    assert (codes[0] > 0).sum() == 3 and (codes[1] == 0).all()  # <ab, abc, bc>
    assert torch.equal(codes[2][:3], codes[0][:3]) and torch.equal(codes[2][3:6], codes[0][:3])


def test_a_dictionary_becomes_pairs_by_entry(tmp_path):
    lines = ["# comment :: here", "Aal {m}; Fisch (groß) | Aale {pl} :: eel; fish [zool.] <x> | eels", "kaputt"]
    lines += [f"Wort{k} {{n}} :: word{k}" for k in range(20)]
    (tmp_path / "de-en").write_text("\n".join(lines))
    data = german_english(tmp_path / "de-en", test_entries=5)
    assert len(data.test_ids.unique()) == 5 and len(data.train_ids.unique()) == 16
    both, sides = torch.cat([data.train, data.test]), torch.cat([data.train_partners, data.test_partners])
    known = (
        [tuple(row.tolist()) for row in ngrams(["aal", "fisch"])],
        [tuple(row.tolist()) for row in ngrams(["eel", "fish"])],
    )
    found = [(tuple(x.tolist()), tuple(y.tolist())) for x, y in zip(both, sides, strict=True)]
    assert (known[0][0], known[1][0]) in found and (known[0][1], known[1][1]) in found and len(found) == 22


def test_damaged_fashion_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no train-images-idx3-ubyte"):
        fashion_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="its checksum differs"):
        fashion_mnist(tmp_path)


def test_a_missing_data_set_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    with pytest.raises(
        ValueError, match="install Debian's package dataset-fashion-mnist, or put the four published files"
    ):
        load("fashion-mnist")
    monkeypatch.delenv("FASHION_MNIST")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # where nobody may write
    monkeypatch.setattr("contrastive.data._DEBIAN_FASHION", tmp_path)
    with pytest.raises(ValueError, match=r"Fashion-MNIST is not on this machine .*/proc/nowhere.*install"):
        load("fashion-mnist")
    with pytest.raises(ValueError, match="install Debian's package trans-de-en"):
        german_english(tmp_path / "nowhere")


# -- encoders ------------------------------------------------------------------------------------------------------------


def test_encoders_do_not_look_across_the_batch():
    x = torch.rand(6, 3, 16, 16)
    for encoder in (encoders.ResNet18(3, dim=4, width=8), encoders.SmallCNN(3, 16, dim=4), encoders.MLP(768, dim=4)):
        torch.testing.assert_close(encoder(x)[:2], encoder(x[:2]), rtol=1e-4, atol=1e-6)
        assert encoder.features(x).ndim == 2


def test_resnet18_has_the_published_number_of_weights():
    backbone = encoders.ResNet18(3).backbone
    assert (
        sum(p.numel() for p in backbone.parameters()) == 11_168_832
    )  # torchvision's 11,176,512 without the stem's 7 x 7 and the classifier


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet50", "is not a known encoder: choose auto, small-cnn"),
        ("timm:resnet18", "needs timm, which is not installed"),
        ("nowhere:Name", "cannot be imported"),
        ("torch.nn:Softmax2d", "one flat embedding for each is needed"),
        ("builtins:dict", "returned dict, not a torch.nn.Module"),
        ("ngrams", "does not fit inputs"),
        ("torch.nn:Linear", r"could not be called with nothing \(.*missing 2 required.*all others need a default"),
        (f"{__name__}:Dropping", r"cannot read inputs of shape \(N, 3, 8, 8\)"),
    ],
)
def test_a_bad_encoder_is_named(name, words):
    with pytest.raises(ValueError, match=words):
        encoders.make(name, torch.zeros(2, 3, 8, 8), dim=4)


class Normalising(encoders.SmallCNN):
    def __init__(self, dim):
        super().__init__(1, 8, dim=dim)
        self.head = nn.Sequential(nn.BatchNorm1d(512), self.head)


class Broken(encoders.SmallCNN):
    def __init__(self, dim):
        super().__init__(1, 8, dim=dim)
        self.scale = nn.Parameter(torch.tensor(torch.inf))

    def forward(self, inputs):
        return super().forward(inputs) * self.scale


def test_what_an_encoder_does_wrong_is_said(tmp_path):
    config = dataclasses.replace(SHORT, epochs=1, chunk=100, encoder=f"{__name__}:Normalising")
    with pytest.warns(RuntimeWarning, match="batch normalisation, which sees one part of a batch at a time"):
        train(config, tmp_path / "normalising")
    config = dataclasses.replace(SHORT, encoder=f"{__name__}:Broken")
    with pytest.raises(FloatingPointError, match=r"at step 0 .* the encoder made embeddings that are not finite"):
        train(config, tmp_path / "broken")


def test_towers_start_alike_where_they_can():
    codes = ngrams(["haus", "maus"])
    data = Dataset(codes, None, codes, None, "texts", codes, codes)
    model = encoders.of(data, "auto", 8)
    left, right = model(codes, codes)
    assert torch.equal(left, right) and model.left is not model.right


# -- settings, scores and pages ------------------------------------------------------------------------------------------


def test_a_file_of_settings_and_the_command_line_over_it(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('loss = "unbalanced"\nepochs = 1\nbatch_size = 300\n[loss_options]\nrho = 0.5\n')
    result = command("train", "--config", file, "--out", tmp_path / "a", "--seed", 7, "--batch-size", 400)
    assert result.exit_code == 0, result.output
    expected = TrainConfig(loss="unbalanced", epochs=1, batch_size=400, seed=7, loss_options={"rho": 0.5})
    assert trainer.load_config(tmp_path / "a") == expected
    result = command(
        "train", "--config", file, "--out", tmp_path / "b", "--loss-options", "rho=0.25,mass=0.9", "--no-ids"
    )
    assert result.exit_code == 0, result.output
    assert trainer.load_config(tmp_path / "b").loss_options == {"rho": 0.25, "mass": 0.9}
    assert_one_sentence(
        command("train", "--out", tmp_path / "c", "--loss-options", "rho"), "must be names with numbers"
    )
    assert_one_sentence(command("train", "--out", tmp_path / "c", "--loss-options", "speed=3"), "it has no such option")
    file.write_text("epoch = 3")
    assert_one_sentence(command("train", "--config", file, "--out", tmp_path / "c"), "sets epoch, which is no setting")
    file.write_text("epochs = ")
    with pytest.raises(ValueError, match="cannot be read"):
        from_file(file)


def test_recall_agrees_with_counting():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    ids = rng.integers(0, 15, 40)
    cosines = (x / np.linalg.norm(x, axis=1)[:, None]) @ (y / np.linalg.norm(y, axis=1)[:, None]).T
    for k in (1, 5, 40):
        nearest = np.argsort(-cosines, axis=1)[:, :k]
        assert recall(x, y, k=k) == np.mean([i in row for i, row in enumerate(nearest)])
        assert recall(x, y, k=k, ids=ids) == np.mean([(ids[row] == ids[i]).any() for i, row in enumerate(nearest)])
    assert recall(np.ones((40, 3)), np.ones((40, 3)), k=1) == 0.0
    with pytest.raises(ValueError, match="are NaN or infinite"):
        recall(np.full((5, 3), np.nan), np.ones((5, 3)), k=1)
    with pytest.raises(ValueError, match="k = 0: must be a whole number, at least 1"):
        recall(np.ones((5, 3)), np.ones((5, 3)), k=0)
    with pytest.raises(ValueError, match="must both be"):
        recall(np.ones((5, 3)), np.ones((4, 3)), k=1)


def test_the_probe_in_fewer_coordinates_is_the_probe():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 200)), np.arange(60) % 3
    x[:, :3] += 2 * np.eye(3)[labels]
    fitted = probing(x, labels, penalty=10.0)
    plain = LogisticRegression(C=0.1, max_iter=5000, tol=1e-3).fit(StandardScaler().fit_transform(x), labels)
    fresh = rng.normal(size=(300, 200))
    other = plain.predict(StandardScaler().fit(x).transform(fresh))
    assert np.mean(fitted.predict(fresh) == other) > 0.99


def test_the_penalty_is_chosen_where_it_matters():
    rng = np.random.default_rng(0)

    def draw(count, wrong):
        truth = np.arange(count) % 2
        x = rng.normal(size=(count, 200))
        x[:, :5] += 0.8 * (2 * truth[:, None] - 1)
        return x, np.where(rng.random(count) < wrong, 1 - truth, truth)

    (x, labels), (fresh, truth) = draw(1000, 0.3), draw(3000, 0.0)
    weak = np.mean(probing(x, labels, penalty=1e-3).predict(fresh) == truth)
    assert probe(x, labels, fresh, truth) > weak + 0.08


def test_evaluation_without_labels():
    data = from_arrays(np.random.default_rng(0).random((60, 5)))
    scores = evaluate(nn.Flatten(), data)
    assert set(scores) == {"R@1", "R@10", "alignment", "uniformity", "rankme", "hubness"}


def test_a_report_in_both_forms(tmp_path):
    for seed in (0, 1):
        out = tmp_path / "runs" / f"seed{seed}"
        train(dataclasses.replace(SHORT, seed=seed, epochs=1), out)
    assert command("evaluate", out).exit_code == 0
    (tmp_path / "runs" / "notes.txt").write_text("a file that runs/* brings along")
    write(sorted((tmp_path / "runs").iterdir()), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "data:image/png;base64" in page and "seed1" in page and "knn5" in page and "raw pixels" in page
    assert command("report", *sorted((tmp_path / "runs").iterdir()), "--out", tmp_path / "page.md").exit_code == 0
    assert "| run | seed |" in (tmp_path / "page.md").read_text() and (tmp_path / "page.png").stat().st_size > 10_000
    assert_one_sentence(command("report", out, tmp_path / "ruhs", "--out", tmp_path / "p.html"), "ruhs does not exist")
    assert_one_sentence(command("report", tmp_path, "--out", tmp_path / "p.html"), "none of .* is a run")
    assert_one_sentence(command("report", out, "--out", tmp_path / "p.pdf"), r"must end in \.html or \.md")


def test_the_experiments_intervals_are_paired_t_intervals():
    from scipy import stats

    rng = np.random.default_rng(0)
    results = []
    for member, shift in (("infonce", 0.0), ("sinkhorn", 0.02), ("global", 0.0)):
        for seed in range(5):
            for temperature in (0.1, 0.2):
                test = 0.8 + 0.01 * seed + shift + 0.001 * rng.normal()
                validation = 0.7 + (temperature == 0.2) * 0.1
                results.append(
                    experiment.Result("clean", member, 0.0, temperature, seed, validation, test, 0.7, 1.0, 1.0)
                )
    found = {row.name: row for row in experiment.rows(results, "clean")}
    chosen = {
        m: [r.test for r in results if r.member == m and r.temperature == 0.2]
        for m in ("infonce", "sinkhorn", "global")
    }
    for member in ("sinkhorn", "global"):
        other = stats.ttest_rel(chosen[member], chosen["infonce"]).confidence_interval(0.95)
        row = found[member]
        np.testing.assert_allclose([row.difference - row.half_width, row.difference + row.half_width], other, rtol=1e-9)
    assert found["sinkhorn"].verdict == "better" and found["sinkhorn"].temperature == 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simclr", "moco", "clip", "supcon", "noisy_pairs", "gradcache"])
def test_examples_of_a_loop_of_ones_own(name):
    """They run, and what they print is that something was learned."""
    words = [sys.executable, str(Path(__file__).parents[1] / "docs" / "examples" / f"{name}.py")]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    shares = [float(x) for x in re.findall(r"([\d.]+)%", done.stdout)]
    least = {"simclr": 85, "moco": 80, "clip": 35, "supcon": 95, "noisy_pairs": 80}.get(name)
    assert least is None or shares[0] > least, done.stdout


def test_the_experiment_from_the_first_run_to_its_page(tmp_path, monkeypatch):
    """On digits, with the fewest runs that make an interval; a second call does nothing again."""
    whole = digits()
    small = Dataset(whole.train, whole.train_labels, whole.test[:300], whole.test_labels[:300], "digits")
    monkeypatch.setattr(experiment, "data", lambda side: (small, small))
    monkeypatch.setattr(experiment, "SEEDS", (0, 1))
    monkeypatch.setattr(experiment, "_LABELS", 20)
    study = experiment.STUDIES["small"]
    study = dataclasses.replace(study, base=dataclasses.replace(study.base, data="digits", train_size=1200, epochs=1))
    monkeypatch.setitem(experiment.STUDIES, "small", study)
    for place in experiment.design(study, quick=True):
        experiment._one(study, place, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 8 and not [path for path in tmp_path.iterdir() if path.is_dir()]

    def again(*_):
        raise AssertionError("a finished run was done again")

    monkeypatch.setattr(experiment, "_one", again)
    results = experiment.run(tmp_path, quick=True)
    assert len(results) == 8 and {r.member for r in results} == {"infonce", "sinkhorn"}
    assert all(0.3 < r.test < 1 for r in results)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- small: begin -->\nold\n<!-- small: end -->\nafter\n")
    experiment.write_page(results, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| infonce") == 4 and "untrained encoder" in text and "| sinkhorn + uniformity |" in text
    assert (tmp_path / "_static" / "experiment-small.png").stat().st_size > 10_000
    page.write_text("without markers")
    with pytest.raises(ValueError, match="has no lines"):
        experiment.write_page(results, page)
