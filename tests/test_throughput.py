"""How fast a run is, by a clock of our own and the makers' figures."""

import time

import jax
import numpy as np
import pytest

from sdegen.runs import throughput

# What JAX calls the devices, and the makers' dense bfloat16 figures.
KINDS = {
    "TPU v4": 275,
    "TPU v5": 459,  # v5p
    "TPU v5p": 459,
    "TPU v5 lite": 197,
    "TPU v6 lite": 918,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_of_a_device_by_its_name(kind):
    assert throughput.peak_flops(kind) == KINDS[kind] * 1e12


def test_the_peak_of_an_unknown_device_is_not_known():
    assert throughput.peak_flops("NVIDIA RTX 9999") is None
    assert throughput.peak_flops() is None  # this machine has a CPU


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets, and an H100 in this machine."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    device = type("Device", (), {"device_kind": "NVIDIA H100 80GB HBM3"})()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    return now


def test_the_first_call_compiles_and_is_not_counted(clock):
    meter = throughput.Speedometer(batch_size=64, flops=98.9e12)
    clock[0] += 60  # compilation
    assert meter.passed(50) == {}
    clock[0] += 10
    rates = meter.passed(20)
    expected = {
        "steps_per_second": 2.0,
        "samples_per_second": 128.0,
        "tflops_per_device": 197.8,
        "utilisation": 0.2,
    }
    assert rates.keys() == expected.keys()
    np.testing.assert_allclose([rates[k] for k in expected], list(expected.values()))
    clock[0] += 10
    assert meter.passed(60)["steps_per_second"] == pytest.approx(4.0)  # of the whole


def test_what_is_not_known_is_not_said(clock, monkeypatch):
    meter = throughput.Speedometer(batch_size=8)
    meter.passed(1)
    clock[0] += 1
    assert meter.passed(1).keys() == {"steps_per_second", "samples_per_second"}
    meter.flops = 1e9
    monkeypatch.setattr(throughput, "peak_flops", lambda: None)
    clock[0] += 1
    assert "utilisation" not in meter.passed(1)


def test_a_trace_is_of_the_third_to_the_fifth_call(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda d: seen.append(("on", d)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("off"))
    with throughput.Trace(tmp_path) as trace:
        for call in range(1, 9):
            trace.call()
            seen.append(call)
    assert seen == [1, 2, ("on", str(tmp_path)), 3, 4, 5, "off", 6, 7, 8]
    seen.clear()
    with throughput.Trace(tmp_path) as trace:  # a run of three calls
        for _ in range(3):
            trace.call()
    assert seen == [("on", str(tmp_path)), "off"]
    seen.clear()
    with throughput.Trace(None) as trace:
        for _ in range(9):
            trace.call()
    assert not seen
