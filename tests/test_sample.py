"""Sampling against exact quantiles, moments, orders and counts."""

import pytest
import jax, jax.numpy as jnp, diffrax as dfx
import sdegen
from oracle import G1, PROBES, PROCESSES, process


@pytest.mark.parametrize("name", PROCESSES)
def test_flow_keeps_every_quantile(name):
    path = process(name)
    a, s = path.alpha(path.t_max), path.sigma(path.t_max)
    start = G1.quantile(PROBES, a, s)[:, None]
    out = sdegen.sample(jax.random.key(0), G1.denoiser(path), start.shape, solver=dfx.Tsit5(), grid=sdegen.Adaptive(1e-11, 1e-11), start=start)
    assert bool(out.ok)
    end = G1.cdf(out.x[:, 0], path.alpha(path.t_min), path.sigma(path.t_min))
    print(abs(end-PROBES).max(), out.evaluations)
    assert abs(end - PROBES).max() < 1e-8
