"""Training, evaluation and the command line of `contrastive`: same seed, same run; nothing lost; errors that help."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

from contrastive import trainer
from contrastive.batches import Batches
from contrastive.cli import app
from contrastive.data import DATASETS, Dataset, augment, digits, load
from contrastive.encoders import SmallCNN
from contrastive.evaluate import compare, embed, evaluate, knn, probe
from contrastive.losses import KNOWN, NAMES
from contrastive.trainer import TrainConfig, initial_encoder, load_config, load_run, train

SHORT = TrainConfig(loss="custom", epochs=4, batch_size=400)


class Softmax(nn.Module):
    """The row softmax with a learnable temperature; `stop_at` raises in place of that step's loss."""

    def __init__(self, *, stop_at=None, error=KeyboardInterrupt, scale=1.0):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.2)))
        self.stop_at, self.error, self.scale, self.calls = stop_at, error, scale, 0

    def forward(self, z0, z1):
        if self.calls == self.stop_at:
            raise self.error
        self.calls += 1
        logits = functional.normalize(z0, dim=1) @ functional.normalize(z1, dim=1).T
        labels = torch.arange(len(z0))
        return self.scale * functional.cross_entropy(logits / self.log_temperature.exp(), labels)


class Recorder(nn.Module):
    """Remembers the embeddings of its first call, then returns another loss than `Softmax`."""

    first = None

    def forward(self, z0, z1):
        if self.first is None:
            self.first = (z0.detach().clone(), z1.detach().clone())
        return (z0 - z1).square().sum(dim=1).mean()


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    return train(SHORT, tmp_path_factory.mktemp("whole") / "run", criterion=Softmax())


def weights(run):
    return torch.load(run.out / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# data


def test_digits_are_split_by_file_order(data):
    from sklearn.datasets import load_digits

    file = load_digits()
    assert (len(data.train), len(data.test)) == (1200, 597)
    for part, labels, where in (
        (data.train, data.train_labels, slice(1200)),
        (data.test, data.test_labels, slice(1200, None)),
    ):
        np.testing.assert_array_equal(part[:, 0].numpy() * 16, file.images[where])
        np.testing.assert_array_equal(labels.numpy(), file.target[where])
        assert part.dtype == torch.float32 and part.min() == 0 and part.max() == 1
        assert set(labels.tolist()) == set(range(10))


def test_unknown_data_lists_the_known():
    with pytest.raises(ValueError, match="data='mnist' is not a known data set: choose one of digits"):
        load("mnist")


def test_augmentation_repeats_under_one_generator_and_moves_on(data):
    images = data.train[:16]
    first, again = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    same, next_one = augment(images, generator), augment(images, generator)
    assert torch.equal(first, again) and torch.equal(first, same)
    assert not torch.equal(same, next_one)


def test_augmentation_of_nothing_is_the_image(data):
    still = augment(data.train, torch.Generator(), degrees=0, shift=0, scale=0, noise=0)
    torch.testing.assert_close(still, data.train, atol=1e-6, rtol=0)


def test_augmentation_keeps_within_its_ranges():
    side = 64  # a dot's centre of mass tells shift, a pair of dots rotation and size
    images = torch.zeros(200, 1, side, side)
    images[:, :, 31:33, 15:17] = images[:, :, 31:33, 47:49] = 1
    moved = augment(images, torch.Generator().manual_seed(0), noise=0)[:, 0]
    x = torch.arange(side) + 0.5
    left, right = moved[:, :, : side // 2], moved[:, :, side // 2 :]

    def centre(part, columns):
        return torch.stack([(part.sum(1) @ columns), (part.sum(2) @ x)], dim=1) / part.sum((1, 2))[:, None]

    a, b = centre(left, x[: side // 2]), centre(right, x[side // 2 :])
    angle = torch.rad2deg(torch.atan2((b - a)[:, 1], (b - a)[:, 0]))
    length = (b - a).norm(dim=1) / 32
    shift = ((a + b) / 2 - side / 2).abs().max(dim=0).values / side
    assert 13 < angle.abs().max() < 15.5
    assert 0.89 < length.min() < 0.94 and 1.06 < length.max() < 1.13
    assert (shift > 0.08).all() and (shift < 0.125).all()  # rotation about the middle, size up to 1.1


# encoder


@pytest.mark.parametrize(("channels", "size", "dim"), [(1, 8, 64), (3, 7, 5), (1, 1, 1)])
def test_encoder_takes_the_sizes_it_is_built_for(channels, size, dim):
    assert SmallCNN(channels, size, dim=dim)(torch.zeros(4, channels, size, size)).shape == (4, dim)


def test_encoder_names_a_bad_width():
    with pytest.raises(ValueError, match="dim=0"):
        SmallCNN(dim=0)


# one seed, one run


def test_batches_cover_an_epoch_once_and_drop_the_rest():
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 8, 8)
    some = Dataset(images, None, images, None, "some")
    batches = Batches(TrainConfig(loss="custom", batch_size=4, augmentation="none"), some)
    assert batches.per_epoch == 2

    def epoch(first):
        return torch.cat([batches.views(step)[0][:, 0, 4, 4] for step in (first, first + 1)]).int().tolist()

    assert len(set(epoch(0))) == len(set(epoch(2))) == 8
    assert epoch(0) != epoch(2)
    assert epoch(0) == epoch(0)


def test_two_views_of_a_step_differ_and_steps_differ(data):
    left, right = Batches(SHORT, data).views(0)
    later, _ = Batches(SHORT, data).views(1)
    other, _ = Batches(dataclasses.replace(SHORT, seed=1), data).views(0)
    assert not torch.equal(left, right) and not torch.equal(left, later) and not torch.equal(left, other)


@pytest.mark.parametrize("part", [slice(0, 400), slice(0, 200), slice(130, 257), slice(399, 400)])
def test_a_part_of_a_batch_is_that_part_of_the_whole(part, data):
    batches = Batches(SHORT, data)
    for whole, some in zip(batches.views(1), batches.views(1, part), strict=True):
        assert torch.equal(whole[part], some)


def test_first_weights_depend_on_the_seed_alone(data):
    first, same, other = (
        initial_encoder(config, data).state_dict()
        for config in (SHORT, TrainConfig(loss=NAMES[-1], temperature=0.7), dataclasses.replace(SHORT, seed=1))
    )
    assert_same_weights(first, same)
    assert not torch.equal(first["backbone.0.weight"], other["backbone.0.weight"])


def test_first_batch_is_the_same_for_another_loss(data, tmp_path):
    config = dataclasses.replace(SHORT, epochs=1)
    seen = Recorder()
    torch.manual_seed(123)  # the global random numbers must not matter
    train(config, tmp_path / "run", criterion=seen)
    encoder = initial_encoder(config, data)
    with torch.no_grad():
        expected = encoder(torch.cat(Batches(config, data).views(0))).chunk(2)
    assert all(torch.equal(z, e) for z, e in zip(seen.first, expected, strict=True))


def test_global_random_state_is_left_alone(data):
    before = torch.get_rng_state()
    initial_encoder(SHORT, data)
    Batches(SHORT, data).views(0)
    assert torch.equal(before, torch.get_rng_state())


# runs


def test_a_run_leaves_its_record(whole):
    names = {path.name for path in whole.out.iterdir()}
    assert names == {"config.json", "last.ckpt", "metrics.csv", "speed.csv", "tensorboard"}
    assert list((whole.out / "tensorboard").glob("events.out.*"))
    assert json.loads((whole.out / "config.json").read_text()) == dataclasses.asdict(SHORT)
    assert load_config(whole.out) == whole.config == SHORT
    header, *rows = (whole.out / "metrics.csv").read_text().splitlines()
    assert header == "step,epoch,loss,loss_minus_ln_n,marginal_error" and len(rows) == len(whole.history) == 12
    assert [float(row.split(",")[2]) for row in rows] == list(whole.history)
    assert [row.split(",")[1] for row in rows] == [str(e) for e in range(4) for _ in range(3)]
    assert whole.epochs == 4 and whole.seconds > 0 and not whole.encoder.training


def test_a_run_learns(whole):
    assert whole.history[-1] < whole.history[0] - 0.2


def test_criterion_parameters_are_trained_without_decay(whole):
    learned = weights(whole)["criterion.log_temperature"]
    assert learned != math.log(0.2)
    groups = torch.load(whole.out / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [SHORT.weight_decay, 0.0]


def test_training_follows_a_plain_loop(whole, data):
    encoder, criterion = initial_encoder(SHORT, data), Softmax()
    optimizer = torch.optim.AdamW(
        [{"params": encoder.parameters()}, {"params": criterion.parameters(), "weight_decay": 0.0}],
        lr=SHORT.learning_rate,
        weight_decay=SHORT.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SHORT.learning_rate, total_steps=12)
    for step in range(12):
        left, right = Batches(SHORT, data).views(step)
        loss = criterion(encoder(left), encoder(right))
        assert loss.item() == pytest.approx(whole.history[step], rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("step", [0, 3, 7], ids=["first-epoch", "after-an-epoch", "amid-an-epoch"])
def test_interrupted_and_resumed_equals_uninterrupted(step, whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=rf"stopped after step {step} of 12; go on with .*--resume --out"):
        train(SHORT, out, criterion=Softmax(stop_at=step))
    stopped = load_run(out)
    assert stopped.epochs == step // 3 and stopped.steps == len(stopped.history) == step
    resumed = train(SHORT, out, criterion=Softmax(), resume=True)
    assert resumed.history == whole.history
    assert_same_weights(weights(resumed), weights(whole))
    assert (out / "metrics.csv").read_text() == (whole.out / "metrics.csv").read_text()


def test_resuming_a_finished_run_changes_nothing(whole):
    before = (whole.out / "last.ckpt").read_bytes()
    again = train(SHORT, whole.out, criterion=Softmax(), resume=True)
    assert again.history == whole.history and (whole.out / "last.ckpt").read_bytes() == before


def test_resuming_a_run_killed_before_its_first_checkpoint_starts_it(whole, tmp_path):
    (tmp_path / "config.json").write_bytes((whole.out / "config.json").read_bytes())
    resumed = train(SHORT, tmp_path, criterion=Softmax(), resume=True)
    assert_same_weights(weights(resumed), weights(whole))


def test_a_crash_leaves_a_loadable_run(tmp_path):
    with pytest.raises(RuntimeError, match="out of luck"):
        train(SHORT, tmp_path / "run", criterion=Softmax(stop_at=4, error=RuntimeError("out of luck")))
    assert load_run(tmp_path / "run").epochs == 1


def test_killed_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    trainer.write_atomically(path, b"old")

    def killed(_):
        raise SystemExit

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(SystemExit):
        trainer.write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"


def test_training_is_quiet_and_restores_the_threads(tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(dataclasses.replace(SHORT, epochs=1, threads=2), tmp_path / "run", criterion=Softmax())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert [str(warning.message) for warning in caught if "lightning" in warning.filename] == []
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_named_loss_trains(name, tmp_path):
    run = train(TrainConfig(loss=name, epochs=1, batch_size=128), tmp_path / "run")
    assert len(run.history) == 9 and np.isfinite(run.history).all()


# misuse


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("epochs", 0, "epochs=0 must be an integer of at least 1: it counts passes"),
        ("epochs", 2.5, "epochs=2.5 must be an integer"),
        ("epochs", True, "epochs=True must be an integer"),
        (
            "batch_size",
            1,
            "batch_size=1 must be an integer of at least 2: an image alone in its batch has no negatives",
        ),
        ("seed", -1, "seed=-1 must be an integer of at least 0"),
        ("threads", 0, "threads=0 must be"),
        ("learning_rate", 0.0, "learning_rate=0.0 must be a finite number above 0: with 0 nothing is learned"),
        ("learning_rate", math.nan, "learning_rate=nan must be a finite number above 0"),
        ("temperature", -1, "temperature=-1 must be a finite number above 0: it divides the cosine similarities"),
        ("temperature", "hot", "temperature='hot' must be a finite number"),
        ("weight_decay", -0.1, "weight_decay=-0.1 must be a finite number of at least 0"),
        ("uniformity", math.inf, "uniformity=inf must be a finite number of at least 0"),
        ("data", "", "data='' must be a word"),
        ("ids", 1, "ids=1 must be true or false"),
        ("broken", 1.5, "broken=1.5 must be a finite number of at least 0 and at most 1: it is a share"),
        ("loss_options", {"rho": "large"}, "loss_options={'rho': 'large'} must be names with numbers"),
        ("precision", "64", "precision='64' is not one of 32, bf16, 16"),
        ("loss", "triplet", f"loss='triplet' is not a known loss: choose one of {', '.join(KNOWN)}"),
    ],
)
def test_config_errors_tell_value_rule_and_fix(field, value, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        TrainConfig(**{field: value})


def test_an_existing_run_is_not_overwritten(whole):
    before = {path: path.read_bytes() for path in whole.out.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run, which is kept: resume it, or choose another directory"):
        train(SHORT, whole.out, criterion=Softmax())
    assert {path: path.read_bytes() for path in whole.out.iterdir() if path.is_file()} == before


def test_resume_names_the_field_that_differs(whole):
    with pytest.raises(ValueError, match=r"learning_rate=0\.1 differs from learning_rate=0\.003"):
        train(dataclasses.replace(SHORT, learning_rate=0.1), whole.out, criterion=Softmax(), resume=True)


def test_resume_without_a_run_says_so(tmp_path):
    with pytest.raises(ValueError, match="is not a run: it does not exist"):
        train(SHORT, tmp_path / "nowhere", criterion=Softmax(), resume=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("loss", ["custom", NAMES[0]])
def test_custom_loss_and_criterion_go_together(loss, tmp_path):
    criterion = None if loss == "custom" else Softmax()
    with pytest.raises(ValueError, match=f"loss='{loss}' with .* criterion="):
        train(dataclasses.replace(SHORT, loss=loss), tmp_path / "run", criterion=criterion)
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size=1201 exceeds the 1200 training inputs"):
        train(dataclasses.replace(SHORT, batch_size=1201), tmp_path / "run", criterion=Softmax())


def test_divergence_is_told_not_trained_on(tmp_path):
    with pytest.raises(FloatingPointError, match=r"became inf at step 0 \(epoch 0\): training diverged"):
        train(SHORT, tmp_path / "run", criterion=Softmax(scale=math.inf))


def test_a_criterion_must_return_a_scalar(tmp_path):
    with pytest.raises(ValueError, match=r"the criterion returned \(400, 64\), not a scalar"):
        train(SHORT, tmp_path / "run", criterion=Difference())


class Difference(nn.Module):
    def forward(self, z0, z1):
        return z0 - z1


def test_out_must_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: a run needs a directory"):
        train(SHORT, tmp_path / "file", criterion=Softmax())


# evaluation


def test_knn_agrees_with_brute_force():
    rng = np.random.default_rng(0)
    train_x, test_x = rng.normal(size=(80, 3)), rng.normal(size=(30, 3))
    train_y, test_y = rng.integers(4, size=80) + 2, rng.integers(4, size=30) + 2
    for k in (1, 5, 20, 80):
        right = 0
        for x, y in zip(test_x, test_y, strict=True):
            cosines = [x @ t / math.sqrt((x @ x) * (t @ t)) for t in train_x]
            order = sorted(range(80), key=lambda i: -cosines[i])
            votes = [train_y[i] for i in order[:k]]
            right += max(sorted(set(votes)), key=votes.count) == y
        assert knn(train_x, train_y, test_x, test_y, k=k) == pytest.approx(right / 30)


def test_knn_on_pixels_agrees_with_scikit_learn(data):
    from sklearn.neighbors import KNeighborsClassifier

    parts = [part.flatten(1).numpy() for part in (data.train, data.test)]
    model = KNeighborsClassifier(5, metric="cosine").fit(parts[0], data.train_labels)
    assert knn(parts[0], data.train_labels, parts[1], data.test_labels, k=5) == pytest.approx(
        model.score(parts[1], data.test_labels), abs=2 / 597
    )


def test_probe_separates_what_is_separable_and_guesses_at_noise():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 100)
    noise = rng.normal(size=(300, 4))
    apart = noise + 20 * np.eye(4)[labels]
    assert probe(apart, labels, apart, labels) == 1.0
    assert probe(apart, labels, apart, labels, per_class=10) == 1.0
    assert probe(noise, labels, rng.normal(size=(300, 4)), labels) < 0.45


def test_probe_does_not_care_for_units(data):
    x, y = data.train.flatten(1).double().numpy(), data.train_labels.numpy()
    whole, scaled = (probe(z[:600], y[:600], z[600:], y[600:]) for z in (x, 1000 * x + 5))
    assert whole == pytest.approx(scaled, abs=2 / 600)


def test_few_labels_repeat_under_a_seed(data):
    x, y = data.train.flatten(1), data.train_labels
    scores = [probe(x, y, x, y, per_class=10, seed=seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


def test_evaluation_beats_the_baselines_where_it_should(whole, data):
    rows = compare(whole.encoder, initial_encoder(SHORT, data), data)
    assert list(rows) == ["trained", "untrained", "raw pixels"]
    labelled = ["probe", "probe@10", "probe@100", "knn5", "knn20", "knn200"]
    assert list(rows["trained"]) == [*labelled, "R@1", "R@10", "alignment", "uniformity", "rankme", "hubness"]
    assert rows["trained"]["probe@10"] > rows["untrained"]["probe@10"]
    assert rows["raw pixels"]["knn5"] == pytest.approx(0.963, abs=0.005)


def test_embedding_is_in_evaluation_mode_and_restores_the_mode():
    encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    np.testing.assert_array_equal(embed(encoder, torch.ones(3, 1, 2, 2), batch_size=2), np.ones((3, 4)))
    assert encoder.training


def test_nan_embeddings_are_an_error():
    class Diverged(nn.Flatten):
        def forward(self, inputs):
            return super().forward(inputs) * math.nan

    images = Dataset(torch.ones(4, 1, 2, 2), torch.arange(4), torch.zeros(1, 1, 2, 2), torch.zeros(1), "nan")
    with pytest.raises(ValueError, match="4 of 4 training embeddings are NaN or infinite: training has most likely"):
        evaluate(Diverged(), images)


def test_one_class_is_an_error():
    with pytest.raises(ValueError, match="one class only: a classifier needs two"):
        probe(np.ones((3, 2)), [1, 1, 1], np.ones((3, 2)), [1, 1, 1])


def test_counts_out_of_range_are_errors():
    x, y = np.eye(4), [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"per_class=3: it must lie between 1 and 2"):
        probe(x, y, x, y, per_class=3)
    with pytest.raises(ValueError, match=r"k=5: the number of neighbours must lie between 1 and the 4"):
        knn(x, y, x, y, k=5)
    with pytest.raises(ValueError, match=r"test features of shape \(4, 4\) with labels of shape \(3,\)"):
        knn(x, y, x, y[:3], k=1)


# command line


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def assert_one_sentence(result, words, *, code=2):
    assert result.exit_code == code
    assert words in result.stderr and "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_train_evaluate_and_resume_from_the_command_line(tmp_path):
    out = tmp_path / "run"
    trained = command("train", "--out", out, "--epochs", 1, "--batch-size", 400, "--seed", 3)
    assert trained.exit_code == 0 and "1 epochs" in trained.stdout and "Next: contrastive evaluate" in trained.stdout
    assert load_config(out) == TrainConfig(epochs=1, batch_size=400, seed=3)
    scored = command("evaluate", out)
    assert scored.exit_code == 0 and "raw pixels" in scored.stdout
    assert list(json.loads((out / "evaluation.json").read_text())["scores"]) == ["trained", "untrained", "raw pixels"]
    assert_one_sentence(command("train", "--out", out), "already holds a run")
    assert_one_sentence(command("train", "--out", out, "--resume", "--seed", 4), "seed=4 differs from seed=3")
    assert command("train", "--out", out, "--resume").exit_code == 0


def test_command_line_errors_are_one_sentence(tmp_path, whole):
    assert_one_sentence(command("train", "--out", tmp_path / "a", "--loss", "triplet"), "loss='triplet'")
    assert_one_sentence(command("train", "--out", tmp_path / "a", "--epochs", 0), "epochs=0")
    assert_one_sentence(command("train", "--out", tmp_path / "a", "--resume"), "does not exist")
    assert_one_sentence(command("evaluate", tmp_path / "a"), "does not exist")
    assert_one_sentence(command("evaluate", tmp_path), "has no config.json")
    assert_one_sentence(command("train", "--out", whole.out / "config.json" / "x"), "config.json")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("cut", [0, 1000, -100], ids=["empty", "beginning", "end-missing"])
def test_a_damaged_checkpoint_is_one_sentence(cut, tmp_path, whole):
    (tmp_path / "config.json").write_bytes((whole.out / "config.json").read_bytes())
    (tmp_path / "last.ckpt").write_bytes((whole.out / "last.ckpt").read_bytes()[:cut])
    assert_one_sentence(command("evaluate", tmp_path), "last.ckpt cannot be read")


def test_a_checkpoint_of_another_kind_is_one_sentence(tmp_path, whole):
    (tmp_path / "config.json").write_bytes((whole.out / "config.json").read_bytes())
    torch.save([1, 2], tmp_path / "last.ckpt")
    assert_one_sentence(command("evaluate", tmp_path), "last.ckpt cannot be read")
    (tmp_path / "last.ckpt").write_bytes(b"x" * 100)
    assert_one_sentence(command("evaluate", tmp_path), r"last.ckpt cannot be read (no file of tensors and numbers)")
    (tmp_path / "last.ckpt").write_bytes(b"")
    assert_one_sentence(command("evaluate", tmp_path), "last.ckpt cannot be read (EOFError)")
    for damaged in ("", "no table"):
        (tmp_path / "metrics.csv").write_text(damaged)
        result = command("report", tmp_path, "--out", tmp_path / "page.md")
        assert_one_sentence(result, "metrics.csv cannot be read")
    (tmp_path / "config.json").write_text('{"speed": 3}')
    assert_one_sentence(command("evaluate", tmp_path), "config.json cannot be read")


def test_help_gives_the_true_defaults_and_losses():
    text = " ".join(command("train", "--help").output.split())
    for field in dataclasses.fields(TrainConfig):
        shown = re.search(rf"--{field.name.replace('_', '-')} .*?Default: (\S+)\. ", text + " ").group(1)
        assert shown == ("none" if field.name == "loss_options" else str(field.default))
    assert all(name in text for name in NAMES)


def loaded(statement):
    """The modules a fresh interpreter holds after `statement`."""
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_does_not_load_what_only_some_commands_need():
    slow = {"lightning", "sklearn", "matplotlib", "tensorboard", "kornia"}
    assert not slow & loaded("import contrastive.trainer, contrastive.evaluate, contrastive.cli")
    assert "sklearn" in loaded("import contrastive.data; contrastive.data.digits()")  # the check can fail


def interruptible():
    """A shell starts what it puts in the background with ctrl-c ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_on_the_command_line_leaves_a_run_to_resume(tmp_path):
    out = tmp_path / "run"
    words = [
        sys.executable,
        "-c",
        "from contrastive.cli import main; main()",
        "train",
        "--epochs",
        "5000",
        "--out",
        out,
    ]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    try:
        while not (out / "speed.csv").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr
    assert re.fullmatch(
        r"contrastive: training stopped after step \d+ of 20000; go on with .*--resume --out .*\n", stderr
    )
    stopped = load_run(out)
    assert stopped.steps >= 1 and len(stopped.history) == stopped.steps


def test_every_data_set_keeps_its_promises():
    for name, make in DATASETS.items():
        try:
            data = make()
        except ValueError as missing:  # a package or a network that is not there, which the message names
            assert "Debian's package" in str(missing)
            continue
        assert data.name == name and data.train.shape[1:] == data.test.shape[1:]
        if data.is_paired:
            assert len(data.train_partners) == len(data.train) == len(data.train_ids)
            assert not set(data.train_ids.tolist()) & set(data.test_ids.tolist())
        else:
            assert len(data.train) == len(data.train_labels) and len(data.test) == len(data.test_labels)
            assert data.train.ndim == 4 and data.train.shape[2] == data.train.shape[3]
