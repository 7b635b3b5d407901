"""Proves which CPUs have instructions for half precision, and that models on those that have none say so once."""

import logging
from pathlib import Path

import pytest
import torch

from dnd_hf.ops import cpu_precision
from dnd_hf.ops.cpu_precision import has_instructions


CPU = torch.device("cpu")


@pytest.fixture
def warnings_without_instructions(monkeypatch, caplog):
    """What models say on a CPU that only has instructions for float32."""
    cpu_precision._warn.cache_clear()
    monkeypatch.setattr(cpu_precision, "has_instructions", lambda device, dtype: dtype == torch.float32)
    caplog.set_level(logging.WARNING, logger="dnd_hf")
    yield lambda: [record.getMessage() for record in caplog.records if "no instructions" in record.getMessage()]
    cpu_precision._warn.cache_clear()


def test_bfloat16_needs_avx512_or_its_successors_on_x86():
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.exists() and "\nflags" in cpuinfo.read_text()
    if not (known and torch.backends.mkldnn.is_available()):
        pytest.skip("the processor's instructions are read on x86 Linux")
    flags = set(cpuinfo.read_text().partition("\nflags")[2].partition("\n")[0].split())
    expected = bool(flags & {"avx512bw", "avx_ne_convert"})
    assert has_instructions(CPU, torch.bfloat16) == expected


def test_only_half_precision_on_cpus_may_lack_instructions():
    assert has_instructions(CPU, torch.float32) and has_instructions(CPU, torch.float64)
    assert has_instructions(torch.device("cuda"), torch.bfloat16)


def test_sampling_scoring_and_both_ways_of_the_tokenizer_warn_once_for_each_precision(
    make_model, make_inputs, make_vae, warnings_without_instructions
):
    model, vae = make_model(), make_vae()
    labels, codes = make_inputs(model)
    images = torch.zeros(1, 3, *vae.tile_size)
    vae.encode(images), model.score(labels, codes)
    assert not warnings_without_instructions()
    vae.bfloat16().encode(images.bfloat16())
    assert len(warnings_without_instructions()) == 1 and "bfloat16" in warnings_without_instructions()[0]
    for use in (
        lambda: vae.half().decode_codes(torch.zeros(1, *vae.grid_size, vae.config.code_depth, dtype=torch.int64)),
        lambda: model.half().score(labels, codes),
        lambda: model.half().generate(labels),
    ):
        cpu_precision._warn.cache_clear()
        before = len(warnings_without_instructions())
        use(), use()
        assert len(warnings_without_instructions()) == before + 1 and "float16" in warnings_without_instructions()[-1]
