"""Many modules from one plan: what fails stops no other, and the same plan again does what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from growlm.cli import main
from growlm.cluster.learning import DONE, FAILED, THERE, learn_all
from growlm.cluster.plan import read_plan
from growlm.errors import ConfigError
from growlm.store import Store
from servers import wait_for
from stores import make_store
from test_server_jobs import text_of

DEFAULTS = (
    'defaults: {kind: lora, r: 4, tokens: 2000, sequence_length: 64, separator: "\\n\\n", learning_rate: 0.003}\n'
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path) -> Path:
    make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 4}})
    (tmp_path / "signs.txt").write_text(text_of("signs"))
    (tmp_path / "digits.txt").write_text(text_of("digits"))
    (tmp_path / "short.txt").write_text("ab")
    return tmp_path / "store"


def plan_of(folder: Path, *modules: str, defaults: str = DEFAULTS) -> Path:
    path = folder / "plan.yaml"
    path.write_text(defaults + "modules:\n" + "".join(f"  {line}\n" for line in modules))
    return path


def test_a_plan_is_learned_and_what_fails_stops_no_other(store, capsys):
    plan = plan_of(
        store.parent, "signs: {data: signs.txt}", "short: {data: short.txt}", "letters: {data: signs.txt}",
        "digits: {data: [digits.txt], kind: blocks}",
    )  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(["learn-all", str(store), str(plan)])
    assert caught.value.code == 1
    told = capsys.readouterr()
    rows = [line.split() for line in told.out.splitlines()]
    assert [row[:2] for row in rows[1:]] == [["signs", DONE], ["letters", THERE], ["digits", DONE], ["short", FAILED]]
    assert told.err.splitlines()[-1].startswith("short: ")
    opened = Store.open(store)
    assert sorted(opened.modules) == ["digits", "letters", "signs"]
    assert (opened.modules["digits"].kind, opened.modules["signs"].kind) == ("blocks", "lora")
    (store.parent / "short.txt").write_text(text_of("signs", 40))
    with pytest.raises(SystemExit) as caught:
        main(["learn-all", str(store), str(plan), "--json"])
    assert caught.value.code == 0
    again = json.loads(capsys.readouterr().out)["modules"]
    assert [one["state"] for one in again] == [THERE, DONE, THERE, THERE]
    assert Store.open(store).verify() == []


def test_the_next_version_is_learned_where_a_plan_says_so(store):
    plan = plan_of(store.parent, "letters: {data: signs.txt, update: true, admit_anyway: true}")
    (outcome,) = learn_all(Store.open(store), read_plan(plan))
    assert (outcome.state, outcome.result["version"]) == (DONE, 2)
    plan = plan_of(store.parent, "nosuch: {data: signs.txt, update: true}")
    with pytest.raises(ConfigError, match="nosuch: there is no such module to update"):
        learn_all(Store.open(store), read_plan(plan))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("modules: {a: {data: nosuch.txt, tokens: -1}, b: {data: signs.txt, epochz: 3}, No Name: {data: x}, c: {}}",
         ["a: {}/nosuch.txt: no such file", "a: tokens is -1", "b: there is no setting epochz",
          "No Name is no name of a module", "c: says no data"]),
        ("defaults: {devices: 2}\nmodules: {a: {data: signs.txt, tokens: many, learning_rate: -1, epochz: 3}}",
         ["a: devices is an option of growlm learn alone", "a: there is no setting epochz", "a: tokens is 'many'",
          "a: learning_rate is -1"]),
        ("modules: {a: {data: signs.txt, replay: signs.txt, replay_ratio: 0.5, epochz: 3}}",
         ["a: there is no setting epochz"]),
        ("defaults: {kind: lora, devices: 2, epochz: 1}\nmodules: {a: {data: signs.txt, kind: blocks}}",
         ["a: devices is an option of growlm learn alone", "a: there is no setting epochz"]),
        ("modules: {a: {data: signs.txt, kind: nope, tokens: many}}", ["a: kind", "a: tokens is 'many'"]),
        ("modules: {a: {data: signs.txt, kind: lora, r: 4, num_experts: 9, epochs: 0}}",
         ["a: num_experts is for modules of kind experts or peer", "a: epochs is 0"]),
        ("modules:\n  a: {data: signs.txt}\n  a: {data: signs.txt}", ["line 3: a stands there twice"]),
        ("modules: {a: {data: [1], update: maybe}}", ["a: data 1 is no path", "a: update is 'maybe'"]),
        ("module: {}", ["names no modules"]),
        ("modules: {a: {data: signs.txt}}\nmore: 1", ["more is not known"]),
        ("modules: [", ["no YAML"]),
        ("defaults: 3\nmodules: {a: {data: signs.txt}}", ["defaults are settings by name"]),
    ],
)  # fmt: skip
def test_all_that_is_wrong_with_a_plan_is_told_before_anything_is_begun(store, capsys, text, told):
    path = store.parent / "plan.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        main(["learn-all", str(store), str(path)])
    said = capsys.readouterr().err.splitlines()
    for one, line in zip(told, said, strict=True):
        assert f"{path}: {one.format(store.parent)}" in line
    assert list(Store.open(store).modules) == ["letters"]


def test_a_plan_that_is_stopped_goes_on_where_it_was(store):
    plan = plan_of(store.parent, "signs: {data: signs.txt}", "digits: {data: digits.txt, epochs: 9, tokens: 2M}")
    command = [sys.executable, "-m", "growlm", "learn-all", str(store), str(plan)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "GROWLM_LOG_SECONDS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # though the tests ignore it
    ) as run:  # fmt: skip
        assert run.stderr is not None
        lines: list[str] = []
        listening = threading.Thread(target=lambda: lines.extend(run.stderr or ()))
        listening.start()
        wait_for(lambda: any("digits: training" in line for line in lines), 60)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 130
        listening.join()
    assert "the same plan again goes on" in lines[-1]
    assert list(Store.open(store).work.glob("digits-*/checkpoint.json"))  # it was told once, and has kept its step
    assert sorted(Store.open(store).modules) == ["letters", "signs"]
    (store.parent / "plan.yaml").write_text(plan.read_text().replace("epochs: 9, tokens: 2M", "epochs: 1"))
    assert [one.state for one in learn_all(Store.open(store), read_plan(plan))] == [THERE, DONE]


def test_without_ray_the_extra_is_named(store, monkeypatch, capsys):
    monkeypatch.setattr("growlm.requirements.find_spec", lambda name: None)
    plan = plan_of(store.parent, "signs: {data: signs.txt}")
    with pytest.raises(SystemExit):
        main(["learn-all", str(store), str(plan), "--ray", "auto"])
    assert 'ray not installed: pip install "growlm[cluster]"' in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:9", "auto"])
def test_a_cluster_that_does_not_answer_is_told(store, address):
    plan = plan_of(store.parent, "signs: {data: signs.txt}")
    last = store.parent / "ray" / "ray_current_cluster"  # of this machine, which others of these tests have as well
    last.parent.mkdir()
    last.write_text("127.0.0.1:9")
    known = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"TMPDIR": str(store.parent)}
    command = [sys.executable, "-m", "growlm", "learn-all", str(store), str(plan), "--ray", address]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=known)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith(f"growlm: --ray {address}: no cluster answers there")
    assert "Traceback" not in run.stderr


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
other = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(other, allow_graceful=False)
cluster.shutdown()
"""


def test_a_machine_that_dies_costs_no_module(store):
    pytest.importorskip("ray")
    names = ["signs", "digits", "both"]
    modules = [f"{name}: {{data: [{'digits' if name == 'digits' else 'signs'}.txt], tokens: 40k}}" for name in names]
    plan = plan_of(store.parent, *modules)
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    ) as cluster:  # fmt: skip
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        command = [sys.executable, "-m", "growlm", "learn-all", str(store), str(plan), "--ray", address, "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            work = Store.open(store).work
            wait_for(lambda: len([p for p in work.glob("*-*/") if p.is_dir()]) >= 2, 90)  # both machines learn
            cluster.stdin.write("kill\n")
            cluster.stdin.flush()
            out, said = run.communicate(timeout=200)
        cluster.stdin.close()
        cluster.wait(60)
    assert run.returncode == 0, said
    assert {one["state"] for one in json.loads(out)["modules"]} <= {DONE, THERE}
    opened = Store.open(store)
    assert sorted(opened.modules) == sorted(["letters", *names])
    assert opened.verify() == []
