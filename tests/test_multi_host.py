"""Two hosts, as network namespaces joined by a cable: training, extraction and sampling follow one process.

Each is started in a way of docs/training.md: by accelerate with multi_node.yaml, by torchrun, or by SLURM's srun, whose
part is played here: it runs a task on each host, with its rank in the environment.

Needs root and iproute2: pytest -m slow tests/test_multi_host.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
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
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CONFIG = REPOSITORY / "examples" / "accelerate_configs" / "multi_node.yaml"
OPTIONS = f"{TRANSFORMER} {NO_DROPOUT} --mixed_precision no"
HALVES = OPTIONS.replace("--train_batch_size 4", "--train_batch_size 2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces, which have `ADDRESSES`."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"dnd-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        first, second = names
        ip("link", "add", "cable1", "netns", first, "type", "veth", "peer", "name", "cable2", "netns", second)
        for number, (name, address) in enumerate(zip(names, ADDRESSES, strict=True), start=1):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{number}")
            for device in ("lo", f"cable{number}"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield names
    for name in names:
        ip("netns", "delete", name)


def accelerate(rank: int) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    return [*launcher, "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0]]


def torchrun(rank: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:29500", "--rdzv_id", "run1"]
    # Both hosts have the name of this machine, by which torchrun would otherwise know and call them.
    names = ["--rdzv_conf", f"is_host={int(rank == 0)}", "--local_addr", ADDRESSES[rank]]
    return [*launcher, *rendezvous, *names]


def srun(rank: int) -> list[str]:
    places = f"RANK={rank} LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR={ADDRESSES[0]} MASTER_PORT=29500"
    return ["env", *places.split(), sys.executable]


def launch(
    hosts: list[str], folder: Path, options: str, launcher: Callable[[int], list[str]] = accelerate
) -> list[subprocess.Popen]:
    """Starts one process on each host, the first one first; what host 2 writes is in `folder/host-2.txt`."""
    processes = []
    for rank, host in enumerate(hosts):
        output = open(folder / f"host-{rank + 1}.txt", "a")  # noqa: SIM115
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *command(options, launcher(rank))],
                cwd=folder,
                env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": f"cable{rank + 1}"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        )
    return processes


def finish_all(processes: list[subprocess.Popen], folder: Path) -> None:
    for number, process in enumerate(processes, start=1):
        assert process.wait(timeout=600) == 0, (folder / f"host-{number}.txt").read_text()[-4000:]


def lose(lost: int, hosts: list[str], processes: list[subprocess.Popen], folder: Path, sign: str) -> str:
    """Kills all on the host with the index `lost` as soon as the file `sign` is there; returns what the other says."""
    while not (folder / sign).exists():
        assert processes[lost].poll() is None, (folder / f"host-{lost + 1}.txt").read_text()[-4000:]
        time.sleep(0.0005)
    pids = subprocess.run(["ip", "netns", "pids", hosts[lost]], check=True, capture_output=True, text=True).stdout
    for pid in map(int, pids.split()):
        os.kill(pid, signal.SIGKILL)
    assert processes[lost].wait() != 0
    assert processes[1 - lost].wait(timeout=120) != 0
    return (folder / f"host-{2 - lost}.txt").read_text()


def versions(folder: Path, pattern: str) -> dict[str, int]:
    """Time of change of each file: what writing it again would alter."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


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
    said = lose(1, hosts, launch(hosts, folder, resuming), folder, "lost/checkpoint-3")
    assert "train.py: error: the connection to another process is lost" in said
    assert "checkpoint-3. Start all processes again, with --resume_from_checkpoint latest." in said

    finish_all(launch(hosts, folder, resuming), folder)
    assert "Resumed at step" in (folder / "host-1.txt").read_text()
    assert_same_state(folder / "two" / "checkpoint-12", folder / "lost" / "checkpoint-12")


@pytest.mark.slow
def test_extraction_by_two_hosts_gives_the_codes_of_one_process_also_after_the_loss_of_one(hosts, folder):
    options = "extract_codes.py --dataset_name words --num_train_images 400 --vqvae vqvae --shard_size 4 --batch_size 4"
    options += " --dataloader_num_workers 0 --output_dir"
    finish(start(folder, f"{options} codes"), folder)

    processes = launch(hosts, folder, f"{options} codes-of-two", torchrun)
    said = lose(1, hosts, processes, folder, "codes-of-two/data-00001-00000.arrow")
    assert "extract_codes.py: error: the connection to another process is lost; its own output says why." in said
    assert "What is written stays: start all processes again with the same command." in said
    two = folder / "codes-of-two"
    written = versions(two, "data-*")
    assert 50 < len(written) < 100 and not (two / "dataset_info.json").exists()

    finish_all(launch(hosts, folder, f"{options} codes-of-two"), folder)
    one, both = (datasets.load_from_disk(str(path)).to_dict() for path in (folder / "codes", two))
    assert both == one and len(one["codes"]) == 400
    assert written.items() <= versions(two, "data-*").items()


@pytest.mark.slow
def test_samples_of_two_hosts_are_those_of_one_process_also_after_the_loss_of_the_first(hosts, folder, make_pipeline):
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    make_pipeline().save_pretrained(folder / "dnd")
    sizes = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    Dinov2Model(Dinov2Config(**sizes, image_size=8, patch_size=4)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "vit")
    np.savez(folder / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), np.uint8))
    options = "evaluate.py --task generation --model dnd --reference real.npz --feature_model vit --num_images 800"
    options += " --batch_size 4 --num_workers 0 --device cpu --output_dir"
    finish(start(folder, f"{options} samples-of-one"), folder)

    processes = launch(hosts, folder, f"{options} samples-of-two", srun)
    said = lose(0, hosts, processes, folder, "samples-of-two/samples/dnd/000000.png")
    assert "evaluate.py: error: process 1: the connection to another process is lost" in said
    assert "Images that are made stay: start all processes again with the same command." in said
    written = versions(folder / "samples-of-two" / "samples" / "dnd", "*.png")
    assert 400 < len(written) < 800  # all of host 2, and what host 1 made

    finish_all(launch(hosts, folder, f"{options} samples-of-two", srun), folder)
    one, two = (folder / f"samples-of-{number}" / "samples" / "dnd" for number in ("one", "two"))
    assert {file.name: file.read_bytes() for file in two.iterdir()} == {
        file.name: file.read_bytes() for file in one.iterdir()
    }
    assert written.items() <= versions(two, "*.png").items()
    results = [json.loads((folder / f"samples-of-{n}" / "results.json").read_text())["rows"] for n in ("one", "two")]
    assert results[0] == results[1] and results[0][0]["num_images"] == 800
