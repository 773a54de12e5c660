"""`tinymim live`: what is read of runs and caches, the server's refusals, and the page in a real browser."""

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import RecipeError, UserError
from tinymim.stages import live
from tinymim.stages.run.folder import METRICS_NAME
from tinymim.storage.leases import Leases
from tinymim.storage.local import LocalStore
from tinymim.storage.store import open_store
from tinymim.tests.browser import Browser, browser

EVIL = "<img src=x onerror=document.title='hit'><script>document.title='hit'</script>"


def write_run(folder: Path, name: str = "first", steps: int = 3, **status: Any) -> Path:
    """A run folder as train-student leaves it in the middle of its work."""
    run = folder / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text("stage: train-student\n")
    lines = [{"step": step, "loss": 1 / (1 + step), "kl_qk": 0.5 / (1 + step), "lr": 0.1} for step in range(steps)]
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    fields = {"label": "train-student", "phase": "running", "done": steps, "total": 10, "unit": "steps"}
    fields |= {"rate_per_s": 0.5, "eta_s": 14.0, "note": "loss 0.3", "pid": 1, "host": "there", "time": now}
    (run / "status.json").write_text(json.dumps(fields | status))
    (run / "log.txt").write_text("2026-01-01 train-student: begins\n")
    return run


def only(state: dict[str, Any]) -> dict[str, Any]:
    assert state["problems"] == []
    [job] = state["jobs"]
    assert isinstance(job, dict)
    return job


# ---------------------------------------------------------------- what is read


def test_a_run_shows_progress_losses_and_messages(tmp_path: Path) -> None:
    write_run(tmp_path)
    job = only(live.Jobs([tmp_path]).state())
    assert (job["kind"], job["name"], job["stage"], job["phase"]) == ("run", "first", "train-student", "running")
    assert (job["done"], job["total"], job["unit"], job["eta_s"]) == (3, 10, "steps", 14.0)
    assert job["where"] == "process 1 on there" and 0 <= job["heartbeat_s"] < 100
    assert {curve["name"]: curve["points"][-1] for curve in job["curves"]} == {
        "loss": (2, 1 / 3),
        "KL qk": (2, 0.5 / 3),
    }
    assert ["learning rate", "1.00e-01"] in job["numbers"]
    assert job["messages"] == ["2026-01-01 train-student: begins"]


def test_what_limits_and_where_time_goes_come_from_the_shares(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / METRICS_NAME).write_text('{"step": 1, "start_share": 0.5, "teacher_share": 0.3, "decode_share": 0.2}\n')
    job = only(live.Jobs([run]).state())
    assert job["limits"] == "teacher (30% of the time)", "the start is over"
    assert job["shares"] == {"start": 0.5, "teacher": 0.3, "decode": 0.2}


def test_audits_and_alarms(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    audit = {"step": 100, "qk": {"kl": 0.25, "gap": 0.1, "measure": "kl"}, "alarms": ["qk: alike for any image"]}
    (run / "audit.jsonl").write_text(json.dumps(audit) + "\n")
    job = only(live.Jobs([run]).state())
    assert job["alarms"] == ["after 100 steps: qk: alike for any image"]
    assert ["audit KL qk", "0.2500"] in job["numbers"]
    assert next(curve for curve in job["curves"] if curve["name"] == "audit KL qk")["points"] == [(100, 0.25)]


def test_a_growing_file_is_read_on_from_where_it_ended_and_again_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lines"
    store = open_store(tmp_path)
    growing = live.GrowingFile(store, "lines")

    def steps() -> list[int]:
        return [line["step"] for line in growing.read(file.stat().st_size)]

    file.write_text('{"step": 0}\n{"step": 1}\nno json\n{"st')
    assert steps() == [0, 1]
    with file.open("a") as more:
        more.write('ep": 2}\n{"step": 3}\n')
    read: list[Any] = []
    ranges = LocalStore.read_ranges

    def noted(store: LocalStore, name: str, some: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        read.append(some)
        return ranges(store, name, some)

    monkeypatch.setattr(LocalStore, "read_ranges", noted)
    assert steps() == [0, 1, 2, 3]
    assert read[0][0][0] == len('{"step": 0}\n{"step": 1}\n'), "what was read is not read again, but its last line"
    assert steps() == [0, 1, 2, 3] and len(read) == 1
    file.write_text('{"step": 0}\n{"step": 7}\n')
    assert steps() == [0, 7]
    file.write_text('{"step": 9}\n{"step": 8}\n{"step": 10}\n')
    assert steps() == [9, 8, 10], "as long as before, or longer, with another content"


def test_a_cache_shows_units_coverage_and_writers(made: Path) -> None:
    jobs = live.Jobs([made])
    cache = next(job for job in jobs.state()["jobs"] if job["kind"] == "cache")
    assert [layer["units"] for layer in cache["layers"]] == [3, 3] and cache["num_images"] == 36
    assert all(layer["shards"] == cache["num_shards"] == 3 for layer in cache["layers"])
    assert cache["writers"] == []


def test_a_writer_of_a_cache_is_shown_with_the_age_of_its_heartbeat(home: Path) -> None:
    leases = Leases(open_store(home / "cache"))
    try:
        assert leases.claim("shards/shard-000001")
        cache = only(live.Jobs([home / "cache"]).state())
    finally:
        leases.close()
    [writer] = cache["writers"]
    assert writer["lease"] == "shards/shard-000001" and "process" in writer["holder"] and writer["age_s"] < 60


def test_new_runs_appear_and_damaged_ones_do_not_hide_others(tmp_path: Path) -> None:
    jobs = live.Jobs([tmp_path, tmp_path / "gone"])
    write_run(tmp_path)
    broken = write_run(tmp_path, "broken")
    (broken / "status.json").write_text("[]")
    (broken / METRICS_NAME).write_bytes(b'{"step": "x", "loss": NaN}\n{"step": 1, "loss": 1e999}\n\xff\n')
    worse = write_run(tmp_path, "worse")
    (worse / "recipe.yaml").write_text("stage: [")
    state = jobs.state()
    assert {job["name"] for job in state["jobs"]} == {"first", "broken"}
    assert [str(worse)] == [problem["place"] for problem in state["problems"]]
    json.dumps(state, allow_nan=False)


def test_a_place_that_does_not_exist_or_a_taken_port_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        live.run([tmp_path / "none"], "127.0.0.1", 0, 5.0)
    with live.open_server([tmp_path], port=0) as server, pytest.raises(RecipeError, match="--port"):
        live.run([tmp_path], "127.0.0.1", server.server_address[1], 5.0)


# ---------------------------------------------------------------- the server


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """The port of a server of `tmp_path`, which asks for news every 0.3 s."""
    with live.open_server([tmp_path], port=0, every_s=0.3) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def asked(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def test_two_pages_are_served_and_nothing_else(port: int, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    code, body, headers = asked(port)
    assert code == 200 and b"<script>" in body and headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert json.loads(asked(port, "/state.json")[1])["jobs"] == []
    for path in ("/secret", "/../secret", "/%2e%2e/secret", "//secret", "/state.json/../secret", f"{tmp_path}/secret"):
        assert asked(port, path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "ANY"):
        code, body, headers = asked(port, method=method)
        assert (code, headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_a_request_for_another_host_is_refused(port: int, host: str) -> None:
    assert asked(port, "/state.json", Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:8360", "127.0.0.1:1", "[::1]:8360", "192.0.2.7"])
def test_a_request_for_this_machine_is_answered(port: int, host: str) -> None:
    assert asked(port, "/state.json", Host=host)[0] == 200


# ---------------------------------------------------------------- the browser

_SMALLEST = """Math.min(...[...document.querySelectorAll('main *')].filter(e => e.innerText && !e.children.length)
  .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
_OUTSIDE = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') &&
  e.getBoundingClientRect().right > innerWidth + 1).length"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [420, 1400])
def test_the_page_loads_updates_by_itself_and_is_legible(
    chromium: Browser, port: int, tmp_path: Path, width: int
) -> None:
    run = write_run(tmp_path, "a-" + "very-long-name-" * 8)
    (run / "audit.jsonl").write_text(json.dumps({"step": 3, "alarms": ["qk: " + "x" * 300]}) + "\n")
    chromium.open(f"http://127.0.0.1:{port}/", width)
    chromium.wait_for("document.body.innerText.includes('3 of 10 steps')")
    assert chromium.run("document.body.innerText.includes('14 s left')")
    assert chromium.run("document.querySelectorAll('.charts svg polyline').length") == 2
    assert chromium.run("document.documentElement.scrollWidth") <= width, "no page scrolls sideways"
    assert chromium.run(_OUTSIDE) == 0 and chromium.run(_SMALLEST) >= 11
    write_run(tmp_path, run.name, steps=10, phase="done", eta_s=0.0)
    write_run(tmp_path, "second")
    chromium.wait_for(
        "document.body.innerText.includes('10 of 10 steps') && document.body.innerText.includes('second')"
    )
    assert chromium.errors == []


def test_hostile_names_and_messages_stay_text(chromium: Browser, port: int, tmp_path: Path) -> None:
    run = write_run(tmp_path, EVIL.replace("/", "|"), note=EVIL, phase=EVIL, unit=EVIL, host=EVIL)
    (run / "recipe.yaml").write_text(json.dumps({"stage": EVIL}))
    (run / "log.txt").write_text(f"{EVIL}\n")
    (run / "audit.jsonl").write_text(json.dumps({"step": 3, "alarms": [EVIL]}) + "\n")
    (run / METRICS_NAME).write_text(json.dumps({"step": 1, EVIL: 1.0, f"{EVIL}_share": 0.5}) + "\n")
    broken = write_run(tmp_path, "broken" + EVIL.replace("/", "|"))
    (broken / "recipe.yaml").write_text(f"stage: [{EVIL}")
    chromium.open(f"http://127.0.0.1:{port}/", 1400)
    chromium.wait_for("document.querySelectorAll('.job').length == 1")
    assert chromium.run("document.title") == "tinymim live"
    assert chromium.run("document.querySelectorAll('main img, main script:not(:last-child)').length") == 0
    assert chromium.run("document.body.innerText.split('onerror=document').length") > 8
    assert chromium.errors == []


def test_a_silent_server_is_said(chromium: Browser, tmp_path: Path) -> None:
    server = live.open_server([tmp_path], port=0, every_s=0.2)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    chromium.open(f"http://127.0.0.1:{server.server_address[1]}/", 420)
    chromium.wait_for("document.body.innerText.includes('0 jobs')")
    server.shutdown()
    server.server_close()
    thread.join()
    chromium.wait_for("document.body.innerText.includes('no answer from tinymim live')")
