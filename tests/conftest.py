"""One thread, reproducible draws, and shapes checked at every call."""

import gc
import os

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Begin with what takes longest, so that no process is left alone with it in the end."""
    items.sort(key=lambda item: getattr(item, "originalname", None) != "test_the_kernels_in_the_interpreter")


def pytest_collection_finish(session):
    """What is there by now stays, and need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``once(name, make)``: a folder that ``make`` has filled, for all processes of one run of the tests."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name, make):
        place = root / name
        with FileLock(f"{place}.lock"):
            if not (place / "made").exists():
                place.mkdir(exist_ok=True)
                make(place)
                (place / "made").touch()
        return place

    return folder


settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=int(os.environ.get("EXAMPLES", "2000")))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The rooms whose functions state shapes; not those a strategy enters, since the checks draw random numbers of their own.
install_import_hook([f"iotsolve.{room}" for room in ("newton", "support")], "beartype.beartype")
