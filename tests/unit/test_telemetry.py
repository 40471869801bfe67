from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request

import pytest

from headwater.dev.services import free_port
from headwater.errors import SettingsError
from headwater.telemetry import METRICS, STEPS, Telemetry, arm


def test_every_metric_of_the_table_is_exposed() -> None:
    telemetry = Telemetry()
    for metric in METRICS:
        labels = dict.fromkeys(metric.labels, "x")
        match metric.kind:
            case "counter":
                telemetry.count(metric.name, 1, **labels)
            case "gauge":
                telemetry.gauge(metric.name, 1, **labels)
            case "histogram":
                telemetry.observe(metric.name, 1, **labels)
    text = telemetry.exposition().decode()
    missing = [metric.name for metric in METRICS if f"# TYPE {metric.name.removesuffix('_total')}" not in text]
    assert missing == []


def test_a_process_without_a_web_server_serves_its_own_figures_until_it_is_told_to_end() -> None:
    telemetry, port = Telemetry(), free_port()
    telemetry.count("headwater_log_rewritten_total")
    end = telemetry.serve("127.0.0.1", port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert b"headwater_log_rewritten_total 1.0" in answer.read()
        with pytest.raises(OSError):
            Telemetry().serve("127.0.0.1", port)
    finally:
        end()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_name_outside_the_table_is_an_error() -> None:
    with pytest.raises(KeyError):
        Telemetry().count("headwater_unheard_of_total")


def test_listeners_hear_what_is_counted() -> None:
    telemetry = Telemetry()
    heard: list[tuple[str, float, dict[str, str]]] = []
    telemetry.listen(lambda name, value, labels: heard.append((name, value, labels)))
    telemetry.count("headwater_runs_accepted_total", kind="chat")
    assert heard == [("headwater_runs_accepted_total", 1, {"kind": "chat"})]


def test_listeners_hear_of_every_step_of_the_table() -> None:
    telemetry = Telemetry()
    heard: list[str] = []
    telemetry.listen(lambda name, value, labels: heard.append(name))
    for step in STEPS:
        telemetry.step(step.name)
    assert heard == [step.name for step in STEPS]
    with pytest.raises(KeyError):
        telemetry.step("accept.dreamt")


@pytest.mark.parametrize("failpoint", ["accept.dreamt", "accept.stored:x", "", "headwater_up"])
def test_a_failpoint_that_does_not_exist_is_refused_by_name(failpoint: str) -> None:
    with pytest.raises(SettingsError, match=r"accept\.journalled"):
        arm(Telemetry(), failpoint)


def test_a_failpoint_ends_the_process_at_its_nth_time_and_not_before() -> None:
    script = (
        "from headwater.telemetry import Telemetry, arm\n"
        "telemetry = Telemetry()\n"
        "arm(telemetry, 'finish.saved:2')\n"
        "for name in ('finish.saved', 'finish.told', 'finish.saved', 'finish.told'):\n"
        "    print(name, flush=True)\n"
        "    telemetry.step(name)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 137
    assert ended.stdout.split() == ["finish.saved", "finish.told", "finish.saved"]


def test_equal_observations_in_one_step_are_those_one_by_one() -> None:
    one, other = Telemetry(), Telemetry()
    for value, times in ((0.0, 1), (0.001, 3), (0.0011, 2), (100.0, 2)):
        one.observe_times("headwater_delivery_seconds", value, times)
        for _ in range(times):
            other.observe("headwater_delivery_seconds", value)
    lines = [
        [
            line
            for line in telemetry.exposition().splitlines()
            if b"delivery_seconds" in line and b"_created" not in line
        ]
        for telemetry in (one, other)
    ]
    assert lines[0] == lines[1]
    assert b"headwater_delivery_seconds_count 8.0" in lines[0]
