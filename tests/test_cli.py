"""The `iotsolve` command: known values, files that come back, and errors of one sentence."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import iotsolve
from iotsolve import AT_MOST, FIXED, FREE, KL, L2, TV, Between, ChiSquared, Problem, cli
from iotsolve.cli import app, parse_side
from iotsolve.inverse import gravity

COST = np.array([[0.0, 2.0, 1.0], [1.0, 0.5, 3.0]])
A, B = np.array([0.25, 0.75]), np.array([0.5, 0.25, 0.25])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("cost.npy", COST)
    np.savez("cost.npz", cost=COST)
    np.savetxt("cost.csv", COST, delimiter=",")
    np.save("a.npy", A)
    np.savetxt("b.csv", B[None], delimiter=",")  # a row
    np.savetxt("b-column.csv", B, delimiter=",")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)


def cell(result, name):
    """The value beside a name in the printed table."""
    (line,) = [x for x in result.stdout.splitlines() if x.strip("│ ").startswith(name)]
    return line.strip("│ ").split("│")[1].strip()


@pytest.mark.parametrize("file", ["cost.npy", "cost.npz", "cost.csv"])
@pytest.mark.parametrize("b", ["b.csv", "b-column.csv"])
def test_exact_value_from_every_kind_of_file(folder, file, b):
    result = run("solve", file, "--a", "a.npy", "--b", b)
    assert result.exit_code == 0, result.stderr
    # by hand: row 0 fills column 2 (.25 at 1); row 1 the others (.5 at 1 and .25 at .5)
    assert float(cell(result, "value")) == pytest.approx(0.875, abs=1e-12)
    assert cell(result, "certificate") == "holds" and cell(result, "status") == "CONVERGED"


def test_semi_relaxed_value_in_closed_form(folder):
    result = run("solve", "cost.npy", "--a", "a.npy", "--b", "b.csv", "--columns", "free", "--epsilon", 0.5)
    expected = -0.5 * (A * np.log((B * np.exp(-COST / 0.5)).sum(1))).sum()  # a soft-min for each row
    assert float(cell(result, "value")) == pytest.approx(expected, rel=1e-11)
    assert float(cell(result, "mass")) == pytest.approx(1.0, rel=1e-11)


def test_partial_mass_is_the_cheapest_share(folder):
    result = run("solve", "cost.npy", "--rows", "at-most", "--columns", "at-most", "--mass", 0.5)
    # uniform weights: the whole of column 0 at cost 0, then 1/6 to column 1 at .5
    assert float(cell(result, "value")) == pytest.approx(1 / 12, abs=1e-12)
    assert float(cell(result, "mass")) == pytest.approx(0.5, abs=1e-12)


def test_written_file_holds_the_solution(folder):
    before = {*os.listdir(folder)}
    sides = ["--rows", "kl:1.0", "--columns", "kl:2", "--mass", 0.8]
    result = run("solve", "cost.npy", "--epsilon", 0.3, *sides, "--out", "plan.npz")
    assert result.exit_code == 0, result.stderr
    with np.load("plan.npz") as saved:
        out = {name: saved[name] for name in saved.files}
    assert set(out) == {"plan", "f", "g", "lam", "value", "status"} and str(out["status"]) == "CONVERGED"
    problem = Problem(COST, epsilon=0.3, rows=KL(1.0), columns=KL(2.0), mass=0.8)
    assert problem.primal(out["plan"]) == pytest.approx(problem.dual(out["f"], out["g"], out["lam"]), rel=1e-8)
    assert out["value"] == pytest.approx(problem.primal(out["plan"]), rel=1e-8)
    assert float(cell(result, "value")) == pytest.approx(float(out["value"]), rel=1e-11)
    assert {*os.listdir(folder)} == before | {"plan.npz"}


def test_forbidden_arc_in_a_csv(folder):
    (folder / "mask.csv").write_text("1,inf\n0,1\n")
    assert float(cell(run("solve", "mask.csv"), "value")) == pytest.approx(1.0, abs=1e-12)


def test_tolerance_and_max_steps_reach_the_solver(folder):
    np.save("many.npy", np.random.default_rng(0).random((30, 30)))
    default, loose = (run("solve", "many.npy", "--epsilon", 0.1, *options) for options in ((), ("--tolerance", 1e-2)))
    assert int(cell(loose, "steps")) < int(cell(default, "steps"))
    few = run("solve", "many.npy", "--epsilon", 0.1, "--max-steps", 2, "--allow-unconverged")
    assert int(cell(few, "steps")) == 2 and cell(few, "status") == "MAX_STEPS"


@pytest.mark.parametrize(
    "text, side",
    [
        ("fixed", FIXED),
        ("FREE", FREE),
        ("at-most", AT_MOST),
        ("between:0.5,2", Between(0.5, 2.0)),
        ("between:0, inf", FREE),
        ("kl:1.5", KL(1.5)),
        (" tv:2e-1", TV(0.2)),
        ("chi2:0.3", ChiSquared(0.3)),
        ("l2:0.3", L2(0.3)),
    ],
)
def test_sides(text, side):
    assert parse_side("rows", text) == side


def write(name, text):
    with open(name, "w") as file:
        file.write(text)


BAD = {
    "no such file": (["solve", "absent.npy"], "absent.npy"),
    "a directory": (["solve", "folder.npy"], "folder.npy"),
    "kind of file": (["solve", "notes.txt"], ".npz"),
    "no numbers": (["solve", "words.csv"], "words.csv"),
    "ragged rows": (["solve", "ragged.csv"], "ragged.csv"),
    "an empty csv": (["solve", "empty.csv"], "empty"),
    "an empty npy": (["solve", "empty.npy"], "empty.npy"),
    "a damaged npz": (["solve", "damaged.npz"], "damaged"),
    "a pickle": (["solve", "objects.npy"], "objects.npy"),
    "two arrays": (["solve", "two.npz"], "first, second"),
    "no array": (["solve", "none.npz"], "0 arrays"),
    "complex numbers": (["solve", "complex.npy"], "real"),
    "three dimensions": (["solve", "batch.npy"], "(2, 2, 2)"),
    "NaN cost": (["solve", "nan.csv"], "cost[0, 1] is NaN"),
    "weights of a wrong size": (["solve", "cost.npy", "--a", "b.csv"], "a has shape (3,)"),
    "weights that are a matrix": (["solve", "cost.npy", "--a", "cost.npy"], "(2, 3)"),
    "negative weights": (["solve", "cost.npy", "--a", "negative.csv"], "non-negative"),
    "unequal totals": (["solve", "cost.npy", "--a", "heavy.csv"], "total"),
    "unknown side": (["solve", "cost.npy", "--rows", "loose"], "'loose'"),
    "side without its number": (["solve", "cost.npy", "--rows", "kl"], "'kl'"),
    "side with a number too many": (["solve", "cost.npy", "--columns", "kl:1,2"], "'kl:1,2'"),
    "side with a number it has not": (["solve", "cost.npy", "--rows", "fixed:1"], "'fixed:1'"),
    "side with words": (["solve", "cost.npy", "--rows", "between:a,b"], "'between:a,b'"),
    "rho of 0": (["solve", "cost.npy", "--rows", "tv:0"], "rho"),
    "bounds that are crossed": (["solve", "cost.npy", "--rows", "between:2,1"], "lo <= hi"),
    "negative epsilon": (["solve", "cost.npy", "--epsilon", "-1"], "epsilon = -1"),
    "NaN epsilon": (["solve", "cost.npy", "--epsilon", "nan"], "epsilon = nan"),
    "mass of 0": (["solve", "cost.npy", "--mass", "0"], "mass = 0"),
    "mass too large": (["solve", "cost.npy", "--rows", "at-most", "--mass", "2"], "mass = 2"),
    "zero plan": (["solve", "cost.npy", "--rows", "free", "--columns", "free"], "mass="),
    "tolerance with exact": (["solve", "cost.npy", "--tolerance", "1e-3"], "tolerance"),
    "tolerance above 1": (["solve", "cost.npy", "--epsilon", "1", "--tolerance", "3"], "tolerance = 3"),
    "no steps": (["solve", "cost.npy", "--epsilon", "1", "--max-steps", "0"], "max_steps = 0"),
    "output in no directory": (["solve", "cost.npy", "--out", "absent/plan.npz"], "absent"),
    "output is a directory": (["solve", "cost.npy", "--out", "folder.npz"], "directory"),
    "output of another kind": (["solve", "cost.npy", "--out", "plan.csv"], ".npz"),
}


@pytest.mark.parametrize("arguments, word", BAD.values(), ids=BAD.keys())
def test_errors_are_one_sentence(folder, arguments, word):
    for name in ("folder.npy", "folder.npz"):
        os.mkdir(name)
    write("words.csv", "left,right\n1,2\n")
    write("ragged.csv", "1,2\n3\n")
    write("nan.csv", "1,nan\n3,4\n")
    write("negative.csv", "-1,2\n")
    write("heavy.csv", "1,1\n")
    for name in ("empty.csv", "empty.npy", "notes.txt"):
        write(name, "")
    write("damaged.npz", "PK\x03\x04 and no more")
    np.save("objects.npy", np.array([{}, None]), allow_pickle=True)
    np.save("complex.npy", COST * 1j)
    np.save("batch.npy", np.zeros((2, 2, 2)))
    np.savez("two.npz", first=COST, second=A)
    np.savez("none.npz")
    before = sorted(os.listdir(folder))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("iotsolve: ") and word in line and "Traceback" not in line
    assert line.endswith((".", "directory", "?"))
    assert sorted(os.listdir(folder)) == before


HARD = ["--a", "a.npy", "--b", "b.csv", "--epsilon", "0.05", "--max-steps", "1"]
UNCONVERGED = ["solve", "cost.npy", *HARD, "--out", "plan.npz"]


def test_unconverged_writes_nothing(folder):
    result = run(*UNCONVERGED)
    assert result.exit_code == 1 and result.stdout == ""
    status, certificate = result.stderr.splitlines()
    assert "max_steps" in status and certificate.startswith("NOT certified")
    assert not (folder / "plan.npz").exists()


def test_unconverged_is_written_when_allowed(folder):
    result = run(*UNCONVERGED, "--allow-unconverged")
    assert result.exit_code == 0 and "max_steps" in result.stderr
    assert cell(result, "status") == "MAX_STEPS" and cell(result, "certificate") == "DOES NOT HOLD"
    with np.load("plan.npz") as saved:
        assert str(saved["status"]) == "MAX_STEPS" and saved["plan"].shape == COST.shape


def test_an_old_file_survives_a_failed_write(folder, monkeypatch):
    arguments = ["solve", "cost.npy", "--out", "plan.npz"]
    run(*arguments)
    before = (folder / "plan.npz").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device", "plan.npz")

    monkeypatch.setattr(np, "savez_compressed", full)
    result = run(*arguments)
    assert result.exit_code == 2 and result.stderr == "iotsolve: plan.npz: No space left on device\n"
    assert (folder / "plan.npz").read_bytes() == before
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_output_without_permission(folder):
    os.mkdir("locked", 0o500)
    result = run("solve", "cost.npy", "--out", "locked/plan.npz")
    assert result.exit_code == 2 and "permission" in result.stderr


def test_the_installed_command(folder):
    """Through the interpreter, so that what a user sees has no traceback around it."""

    def shell(*arguments):
        call = [sys.executable, "-c", "from iotsolve.cli import main; main()", *arguments]
        return subprocess.run(call, capture_output=True, text=True, timeout=120)

    assert shell("--version").stdout.strip() == f"iotsolve {iotsolve.__version__}"
    failed = shell("solve", "absent.npy")
    assert failed.returncode == 2 and failed.stderr == "iotsolve: absent.npy: No such file or directory\n"
    assert "solve" in run("--help").stdout

    with open("/dev/full", "w") as full:
        call = [sys.executable, "-m", "iotsolve", "solve", "cost.npy"]
        failed = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert failed.returncode == 2 and failed.stderr.startswith("iotsolve: file: No space left"), failed.stderr


# -- invert ------------------------------------------------------------------------------------------------------------


def test_invert_estimates_a_gravity_equation(folder):
    (folder / "flows.csv").write_text(
        "origin,destination,flow,far\nA,A,8,0\nA,B,2,1\nB,A,4,1\nB,B,4,0\n", encoding="utf-8"
    )
    done = run("invert", folder / "flows.csv", "--features", "far", "--errors", "model", "--out", folder / "fit.json")
    assert done.exit_code == 0, done.output
    found = json.loads((folder / "fit.json").read_text())["coefficients"]["far"]
    assert found["estimate"] == pytest.approx(-math.log(2), abs=1e-8)  # half the log of the cross ratio
    assert found["standard_error"] == pytest.approx(0.5 * math.sqrt(1 / 8 + 1 / 2 + 1 / 4 + 1 / 4), rel=1e-6)
    assert "far" in done.output and "std. error" in done.output


def test_invert_draws_what_it_found(folder):
    lines = [f"{i},{j},{3 + (i * 7 + j * 3) % 11},{abs(i - j)},{(i * j) % 5},1" for i in range(6) for j in range(6)]
    (folder / "flows.csv").write_text("origin,destination,flow,far,other,one\n" + "\n".join(lines), encoding="utf-8")
    done = run("invert", folder / "flows.csv", "--features", "far,other,one", "--plot", folder / "fit.png")
    assert done.exit_code == 0, done.output
    assert (folder / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]  # nothing half written
    names = dict(flow="flow", origin="origin", destination="destination", cluster=None)
    fit, draw, _ = cli._gravity(folder / "flows.csv", ["far", "other", "one"], **names)
    left, right = draw(fit, "robust").axes
    far = np.array([abs(i - j) for i in range(6) for j in range(6)])
    x, y = left.lines[0].get_data()
    assert x[0] == pytest.approx(far.std() * fit.coefficients[0]) and list(y) == [0, 1]
    assert [text.get_text() for text in left.texts] == ["not identified"]
    assert right.lines[0].get_ydata().sum() == pytest.approx(sum(float(line.split(",")[2]) for line in lines))


@pytest.mark.parametrize("cluster", ["region", "from", "far"])  # a column of its own, one of the places, a feature
def test_invert_clusters_when_it_is_told_the_labels(folder, cluster):
    lines = [f"{i},{j},{3 + (i * 7 + j * 3) % 11},{abs(i - j)},{i % 3}" for i in range(6) for j in range(6)]
    (folder / "flows.csv").write_text("from,to,n,far,region\n" + "\n".join(lines), encoding="utf-8")
    places = dict(flow="n", origin="from", destination="to", cluster=cluster)
    options = [word for name, value in places.items() for word in (f"--{name}", value)]
    done = run("invert", "flows.csv", "--features", "far", *options, "--out", "fit.json")
    assert done.exit_code == 0, done.output
    table = dict(
        zip(["from", "to", "n", "far", "region"], np.array([x.split(",") for x in lines], float).T, strict=True)
    )
    found = json.loads((folder / "fit.json").read_text())
    assert found["errors"] == "clustered" and "standard errors: clustered" in done.stdout
    error = gravity(table, features=["far"], **places).errors("clustered")[0]
    assert found["coefficients"]["far"]["standard_error"] == pytest.approx(error, rel=1e-9)


COUPLES = {(0, 0): 40, (0, 1): 15, (1, 0): 10, (1, 1): 35}


def write_couples(path):
    lines = [f"{x},{y},7" for (x, y), count in COUPLES.items() for _ in range(count)]
    path.write_text("his,hers,constant\n" + "\n".join(lines), encoding="utf-8")


def test_invert_finds_the_affinity_of_couples(folder):
    write_couples(folder / "couples.csv")
    traits = ["--row-traits", "his, constant", "--column-traits", "hers", "--errors", "model"]
    done = run("invert", "couples.csv", *traits, "--out", "fit.json", "--plot", "fit.png")
    assert done.exit_code == 0, done.output
    assert (folder / "fit.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "fit.json").read_text())
    odds = math.log(40 * 35 / (15 * 10))  # of two types on each side all that can be told is the odds ratio
    assert found["coefficients"]["his*hers"]["estimate"] == pytest.approx(odds, rel=1e-7)
    error = math.sqrt(sum(1 / count for count in COUPLES.values()))
    assert found["coefficients"]["his*hers"]["standard_error"] == pytest.approx(error, rel=1e-6)
    unknown = found["coefficients"]["constant*hers"]
    assert not unknown["identified"] and unknown["standard_error"] is None and unknown["interval"] is None
    assert found["observations"] == 100 and "constant*hers" in found["notes"][0]
    assert "dimension 1: share 1.000" in done.stdout and "note: " in done.stdout


def test_invert_draws_the_affinity(folder):
    write_couples(folder / "couples.csv")
    fit, draw, _ = cli._affinity(folder / "couples.csv", ["his", "constant"], ["hers"])
    heat, shares, _ = draw(fit, "model").axes
    unit = np.sqrt(0.45 * 0.55) * np.sqrt(0.5 * 0.5)  # of both traits
    odds, error = math.log(40 * 35 / (15 * 10)), 1.96 * math.sqrt(sum(1 / x for x in COUPLES.values()))
    assert [text.get_text() for text in heat.texts] == [f"{unit * odds:.2f}\n± {unit * error:.2f}", "not\nidentified"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["his", "constant"]
    assert [bar.get_height() for bar in shares.patches] == pytest.approx([1.0])


def test_invert_says_in_the_picture_that_the_data_are_separated(folder):
    (folder / "couples.csv").write_text("his,hers\n" + "0,0\n1,1\n" * 10, encoding="utf-8")
    flows = [
        f"{i},{j},{3 + (i * 7 + j * 3) % 11 if i != j else 0},{int(i == j)},{(i * j) % 5}"
        for i in range(6)
        for j in range(6)
    ]
    (folder / "flows.csv").write_text("origin,destination,flow,same,other\n" + "\n".join(flows), encoding="utf-8")
    names = dict(flow="flow", origin="origin", destination="destination", cluster=None)
    for fit, draw, _ in (
        cli._affinity(folder / "couples.csv", ["his"], ["hers"]),
        cli._gravity(folder / "flows.csv", ["same", "other"], **names),
    ):
        figure = draw(fit, "model")
        assert fit.separated and "goes to infinity" in figure.get_suptitle()
    left = figure.axes[0]
    assert [text.get_text() for text in left.texts] == ["no end"] and left.get_yticklabels()[0].get_text() == "same\n"
    assert left.get_xlim()[0] > -1.0  # the other effect is not lost beside an endless one


def test_invert_writes_nothing_where_the_data_say_nothing(folder):
    (folder / "flows.csv").write_text("origin,destination,flow,far\nA,A,8,0\n", encoding="utf-8")
    done = run("invert", "flows.csv", "--features", "far", "--out", "fit.json", "--plot", "fit.png")
    assert done.exit_code == 1 and "not identified: far" in done.stdout
    assert not (folder / "fit.json").exists() and not (folder / "fit.png").exists()


def test_invert_says_how_to_get_matplotlib(folder, monkeypatch):
    (folder / "flows.csv").write_text("origin,destination,flow,far\nA,A,8,0\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("invert", "flows.csv", "--features", "far", "--plot", "fit.png")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "pip install 'iotsolve[train]'" in done.stderr


HEADER = "origin,destination,flow,far\n"


@pytest.mark.parametrize(
    "text, options, word",
    [
        (
            HEADER + "A,A,8,0\n",
            ["--features", "far", "--plot", "no/such/fit.png"],
            "--plot no/such/fit.png: no/such is no",
        ),
        (
            HEADER + "A,A,8,0\n",
            ["--features", "far", "--plot", "fit.pdf"],
            "--plot fit.pdf: the file written is a picture",
        ),
        (HEADER + "A,A,8,0\n", ["--features", "far", "--out", "fit.npz"], "must end in .json"),
        (HEADER + "A,A,8,0\n", ["--features", "near"], "no column 'near'"),
        (HEADER + "A,A,8,0\n", ["--features", "far,far"], "each once"),
        (HEADER + "A,A,8,0\n", ["--features", " , "], "must name columns"),
        (HEADER + "A,A,8,0\n", ["--features", "far,flow"], "'flow' is to explain itself"),
        (HEADER + "A,A,8,0\n", ["--features", "far", "--destination", "origin"], "both origin and destination"),
        (HEADER + "A,A,8,0\n", ["--features", "far", "--errors", "clustered"], "errors = clustered without"),
        (HEADER + "A,A,8,0\n", ["--features", "far", "--errors", "robust", "--cluster", "far"], "errors = robust with"),
        (HEADER + "A,A,8,0\n", ["--row-traits", "far"], "--column-traits"),
        (HEADER + "A,A,8,0\n", ["--row-traits", "far", "--column-traits", "far"], "a trait of both sides"),
        (
            HEADER + "A,A,8,0\n",
            ["--row-traits", "far", "--column-traits", "flow", "--flow", "flow"],
            "--flow with traits",
        ),
        (HEADER + "A,A,8,0\n", [], "give --features"),
        (HEADER, ["--features", "far"], "no lines"),
        ("", ["--features", "far"], "no lines"),
        (
            HEADER + "A,A,8,0\nA,B,many,0\n",
            ["--features", "far"],
            "line 3, column 'flow' must hold a number, not 'many'",
        ),
        (HEADER + "A,A,8,0\nA,B,1,\n", ["--features", "far"], "line 3, column 'far' must hold a number, not ''"),
        (HEADER + "A,A,8,nan\n", ["--features", "far"], "not 'nan'"),
        (HEADER + "A,A,1e400,0\n", ["--features", "far"], "not '1e400'"),
        (HEADER + "A,A,1e200,0\n", ["--features", "far"], "1e+200 is out of proportion"),
        (HEADER + "A,A,8,1e-200\n", ["--features", "far"], "1e-200 is out of proportion"),
        (HEADER + "A,A,8,0\nA,B,-1,0\n", ["--features", "far"], "line 3: the flow is -1"),
        (HEADER + "A,A,0,0\nA,B,0,0\n", ["--features", "far"], "nothing was observed"),
        (HEADER + "A,A,8,0\n\nA,A,1,0\n", ["--features", "far"], "lines 2 and 4 are both from 'A' to 'A'"),
        (HEADER + "A,A,8,0\nA,B,8\n", ["--features", "far"], "line 3: 3 entries under 4 names"),
        (HEADER + "A,A,8,0\nNew York, NY,A,8,0\n", ["--features", "far"], "line 3: 5 entries under 4 names"),
        (HEADER + "A,,8,0\n", ["--features", "far"], "line 2, column 'destination': '' is blank"),
        (HEADER + "A,A,8,0\nA ,B,8,0\n", ["--features", "far"], "'A ' is blank, or has blanks"),
        (HEADER + '"A,A,8,0\n', ["--features", "far"], "quotation mark"),
        ("origin,destination,flow,far,far\nA,A,8,0,1\n", ["--features", "far"], "2 columns 'far'"),
        ("origin;destination;flow;far\nA;A;8;0\n", ["--features", "far"], "with commas between"),
        (HEADER + "Zürich,A,8,0\n", ["--features", "far"], "UTF-8"),
    ],
)
def test_invert_refuses_in_one_sentence(folder, text, options, word):
    (folder / "flows.csv").write_text(text, encoding="latin-1")
    before = sorted(os.listdir(folder))
    done = run("invert", "flows.csv", *options)
    assert done.exit_code == 2 and word in done.stderr, done.stderr
    assert done.stderr.startswith("iotsolve: ") and done.stderr.count("\n") == 1 and done.stdout == ""
    assert sorted(os.listdir(folder)) == before
