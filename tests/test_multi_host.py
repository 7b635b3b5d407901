"""Two hosts, as network namespaces joined by a cable, train with examples/accelerate_configs/multi_node.yaml.

Needs root and iproute2: pytest -m slow tests/test_multi_host.py
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_resume_and_parallel import (
    ENVIRONMENT,
    NO_DROPOUT,
    REPOSITORY,
    TRANSFORMER,
    assert_same_state,
    command,
    finish,
    folder,
    start,
)

from dnd_hf.training.metrics import read_metrics


__all__ = ["folder"]  # the fixture
CONFIG = REPOSITORY / "examples" / "accelerate_configs" / "multi_node.yaml"
OPTIONS = f"{TRANSFORMER} {NO_DROPOUT} --mixed_precision no"
HALVES = OPTIONS.replace("--train_batch_size 4", "--train_batch_size 2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces; the first has the address 10.77.0.1."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"dnd-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        first, second = names
        ip("link", "add", "cable1", "netns", first, "type", "veth", "peer", "name", "cable2", "netns", second)
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", f"cable{number}")
            for device in ("lo", f"cable{number}"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield names
    for name in names:
        ip("netns", "delete", name)


def launch(hosts: list[str], folder: Path, options: str) -> list[subprocess.Popen]:
    """Starts one process on each host, the first one first; what host 2 writes is in `folder/2`."""
    processes = []
    for rank, host in enumerate(hosts):
        launcher = ["ip", "netns", "exec", host, sys.executable, "-m", "accelerate.commands.launch"]
        launcher += ["--config_file", str(CONFIG), "--num_processes", "2", "--machine_rank", str(rank)]
        launcher += ["--main_process_ip", "10.77.0.1"]
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": f"cable{rank + 1}"}
        output = open(folder / f"host-{rank + 1}.txt", "a")  # noqa: SIM115
        processes.append(
            subprocess.Popen(
                command(options, launcher),
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        )
    return processes


def finish_all(processes: list[subprocess.Popen], folder: Path) -> None:
    for number, process in enumerate(processes, start=1):
        assert process.wait(timeout=600) == 0, (folder / f"host-{number}.txt").read_text()[-4000:]


@pytest.mark.slow
def test_two_hosts_follow_one_process_and_survive_the_loss_of_one_exactly(hosts, folder):
    finish(start(folder, f"{OPTIONS} --output_dir one"), folder)
    finish_all(launch(hosts, folder, f"{HALVES} --output_dir two"), folder)
    one, two = (
        [line["train/loss"] for line in read_metrics(folder / name / "metrics.jsonl") if "train/loss" in line]
        for name in ("one", "two")
    )
    assert len(one) == 12 and two == pytest.approx(one, abs=1e-5)

    resuming = f"{HALVES} --output_dir lost --resume_from_checkpoint latest"
    first, second = launch(hosts, folder, resuming)
    while not (folder / "lost" / "checkpoint-3").exists():
        assert first.poll() is None, (folder / "host-1.txt").read_text()[-4000:]
        time.sleep(0.0005)
    pids = subprocess.run(["ip", "netns", "pids", hosts[1]], check=True, capture_output=True, text=True).stdout.split()
    for pid in map(int, pids):
        os.kill(pid, signal.SIGKILL)
    second.wait()
    assert first.wait(timeout=120) != 0
    said = (folder / "host-1.txt").read_text()
    assert "train.py: error: the connection to another process is lost" in said
    assert "checkpoint-3. Start all processes again, with --resume_from_checkpoint latest." in said

    finish_all(launch(hosts, folder, resuming), folder)
    assert "Resumed at step" in (folder / "host-1.txt").read_text()
    assert_same_state(folder / "two" / "checkpoint-12", folder / "lost" / "checkpoint-12")
