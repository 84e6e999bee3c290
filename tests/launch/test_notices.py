"""Notices reach a server of this machine; one that fails or hangs is no failure of the run."""

import http.server
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.launching import launch
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch import notices
from yxanul_nemo.launch.notices import notify

POST = (
    f"{sys.executable} -c 'import os, sys, urllib.request as u; "
    'u.urlopen(os.environ["HOOK_ADDRESS"], data=sys.stdin.buffer.read(), timeout=10)\''
)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Return the notices that a local server was sent."""
    found: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HOOK_ADDRESS", f"http://127.0.0.1:{server.server_port}/")
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("event", ["end", "failure", "preemption"])
def test_a_notice_says_what_happened_to_which_run(
    make_config: Callable[..., RunConfig], received: list[dict[str, Any]], tmp_path: Path, event: notices.Event
) -> None:
    config = make_config(f"run.dir={tmp_path}")
    notify(config.model_copy(update={"notify": config.notify.model_copy(update={"command": POST})}), event, "why")
    (notice,) = received
    assert (notice["event"], notice["run"], notice["message"]) == (event, "demo", "why")
    assert notice["run_dir"] == str(tmp_path) and notice["host"] and notice["time_unix"] > 1e9


def test_only_events_that_were_asked_for_are_told(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    told = tmp_path / "told"
    config = make_config("notify.events=[failure]")
    config = config.model_copy(
        update={"notify": config.notify.model_copy(update={"command": f"echo $YXANUL_EVENT >> {told}"})}
    )
    for event in ("end", "preemption", "failure"):
        notify(config, event, "")
    assert told.read_text() == "failure\n"


@pytest.mark.parametrize(("command", "said"), [("echo no; exit 3", "ended with code 3: no"), ("sleep 60", "was ended")])
def test_a_notice_that_cannot_be_given_is_a_warning(
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
    command: str,
    said: str,
) -> None:
    monkeypatch.setattr(notices, "PATIENCE_SECONDS", 5.0)
    config = make_config()
    notify(config.model_copy(update={"notify": config.notify.model_copy(update={"command": command})}), "end", "")
    assert said in log.text


def test_a_secret_has_no_place_in_the_command(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match=r"notify.*others can read"):
        make_config("notify.command='curl https://name:word@host/'")


def test_a_launcher_tells_of_the_end_once(prepared: Path, tmp_path: Path, received: list[dict[str, Any]]) -> None:
    for part in ("data", "tokenizer"):
        shutil.copytree(prepared / part, tmp_path / part)
    asked = ("stage=train", "phases=1", f"run.dir={tmp_path}", f"notify.command={POST}")
    for _ in range(2):
        done = launch(*asked)
        assert done.returncode == 0, done.stdout
    assert [notice["event"] for notice in received] == ["end"] and received[0]["message"] == "done: train"
