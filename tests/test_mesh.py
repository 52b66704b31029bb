"""Eight simulated devices: the numbers of one, no collectives where none belong."""

import functools
import re

import chex
import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sdegen
from sdegen import nets, prediction, solvers
from sdegen.mesh import batch_sharding, data_mesh, replicated

pytestmark = pytest.mark.usefixtures("float32")
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")


@functools.cache
def denoiser():
    network = nets.Mlp(width=16, depth=1)((2,), jax.random.key(0))
    # away from the zero initialisation, so that the network has a say
    network = jax.tree.map(
        lambda a: a + 0.05 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), network
    )
    return sdegen.Denoiser(network, sdegen.VP(), prediction.v, 1.0)


def data(n=256):
    return np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)


CASES = {
    "flow": {"solver": dfx.Heun(), "stochasticity": 0.0},
    "SDE": {"solver": dfx.ShARK(), "stochasticity": 1.0},
    "UniPC": {"solver": solvers.UniPC(), "stochasticity": 0.0},
    "ER-SDE": {"solver": solvers.ERSDE(), "stochasticity": 1.0},
}


@pytest.mark.parametrize("case", ["UniPC", "SDE"])
def test_a_user_may_ask_for_the_sharding_of_the_output_instead(case):
    options = {"grid": sdegen.LogSNRGrid(6)} | CASES[case]
    key, mesh = jax.random.key(1), data_mesh()
    sampler = jax.jit(
        lambda key: sdegen.sample(key, denoiser(), (64, 2), **options).x,
        out_shardings=batch_sharding(mesh),
    )
    one = sdegen.sample(key, denoiser(), (64, 2), **options).x
    chex.assert_trees_all_close(np.asarray(sampler(key)), np.asarray(one), atol=2e-6)
    text = sampler.lower(key).compile().as_text()
    assert not any(word in text for word in COLLECTIVES)


def in_the_loop(text):
    """The parts of a compiled program that run once a step: all that whiles call."""
    parts = {}
    for block in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", block)
        if name:
            parts[name[1]] = block
    reached, new = set(), set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    assert new  # there is a loop
    while new:
        reached |= new
        calls = r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)"
        new = {n for part in new for n in re.findall(calls, parts[part])} - reached
    return "\n".join(parts[name] for name in reached)


LOOPS = CASES | {
    "adaptive": {
        "solver": solvers.ExponentialAdams(),
        "grid": sdegen.Adaptive(1e-3, 1e-3),
    },
    "adaptive per sample": {
        "solver": dfx.Tsit5(),
        "grid": sdegen.Adaptive(1e-3, 1e-3, per_sample=True),
    },
}


@pytest.mark.parametrize("case", LOOPS)
def test_a_sharded_sampler_has_the_numbers_of_one_device_and_no_collective(case):
    options = {"grid": sdegen.LogSNRGrid(6)} | LOOPS[case]
    sharding = batch_sharding(data_mesh())
    sampler = jax.jit(
        lambda key, model: (
            sdegen.sample(key, model, (64, 2), sharding=sharding, **options).x
        )
    )
    compiled = sampler.lower(jax.random.key(1), denoiser()).compile()
    inside = in_the_loop(compiled.as_text())
    assert "dot(" in inside or "fusion(" in inside  # the network is in there
    assert not any(word in inside for word in COLLECTIVES)
    x = compiled(jax.random.key(1), denoiser())
    assert len(x.sharding.device_set) == 8
    assert x.addressable_shards[0].data.shape == (8, 2)  # really split
    one = sdegen.sample(jax.random.key(1), denoiser(), (64, 2), **options).x
    tolerance = 2e-6 if "adaptive" not in case else 1e-2
    chex.assert_trees_all_close(np.asarray(x), np.asarray(one), atol=tolerance)


def test_a_step_size_shared_by_all_devices_would_be_seen():
    """The other way round: without `sharding` the common step is a reduction."""
    sampler = jax.jit(
        lambda key, start: (
            sdegen.sample(key, denoiser(), (64, 2), start=start, **LOOPS["adaptive"]).x
        )
    )
    start = jax.device_put(jnp.ones((64, 2)), batch_sharding(data_mesh()))
    text = sampler.lower(jax.random.key(1), start).compile().as_text()
    assert any(word in in_the_loop(text) for word in COLLECTIVES)


def test_training_on_a_mesh_gives_the_numbers_of_one_device():
    options = {"steps": 24, "batch_size": 64, "progress": False, "steps_per_call": 8}
    one = sdegen.fit(denoiser(), data(), **options)
    many = sdegen.fit(denoiser(), data(), mesh=data_mesh(), **options)
    chex.assert_trees_all_close(many.losses, one.losses, rtol=1e-4)
    pairs = (jax.tree.leaves(run.state.network) for run in (many, one))
    for a, b in zip(*pairs, strict=True):
        chex.assert_trees_all_close(np.asarray(a), np.asarray(b), atol=2e-4)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="divisible by the 8 devices"):
        sdegen.fit(denoiser(), data(), steps=1, batch_size=60, mesh=data_mesh())
    with pytest.raises(ValueError, match="9 devices, 8 are here"):
        data_mesh(9)


def one_step(model, transform, key, x0):
    state = sdegen.init_state(model.network, transform)
    return jax.jit(lambda s, x: sdegen.train_step(s, model, transform, x, None, key))(
        state, x0
    )


def test_the_train_step_runs_unchanged_under_pmap():
    """Sample i of the whole batch draws the same time and noise as on one device."""
    model, key, x0 = denoiser(), jax.random.key(2), jnp.asarray(data(64))
    transform = sdegen.AdamW().transform(100)
    state, metrics = one_step(model, transform, key, x0)

    step = jax.pmap(
        lambda s, x: sdegen.train_step(
            s, model, transform, x, None, key, axis_name="batch"
        ),
        axis_name="batch",
        in_axes=(None, 0),
    )
    start = sdegen.init_state(model.network, transform)
    states, many = step(start, x0.reshape(8, 8, 2))
    for device in range(8):
        chex.assert_trees_all_close(many["loss"][device], metrics["loss"], rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(states.network), jax.tree.leaves(state.network), strict=True
    ):
        assert np.ptp(np.asarray(a), axis=0).max() == 0  # all devices agree
        chex.assert_trees_all_close(np.asarray(a[0]), np.asarray(b), atol=1e-5)


def test_the_train_step_runs_unchanged_under_shard_map():
    model, key, x0 = denoiser(), jax.random.key(2), jnp.asarray(data(64))
    transform, mesh = sdegen.AdamW().transform(100), data_mesh()
    _, metrics = one_step(model, transform, key, x0)
    start = sdegen.init_state(model.network, transform)
    step = jax.jit(
        jax.shard_map(
            lambda s, x: sdegen.train_step(
                s, model, transform, x, None, key, axis_name="data"
            ),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=False,
        )
    )
    _, many = step(start, x0)
    chex.assert_trees_all_close(many["loss"], metrics["loss"], rtol=1e-5)


def test_the_data_parallel_step_only_reduces_gradients():
    model, mesh = denoiser(), data_mesh()
    transform, key = sdegen.AdamW().transform(100), jax.random.key(0)
    state = jax.device_put(
        sdegen.init_state(model.network, transform), replicated(mesh)
    )
    x0 = jax.device_put(jnp.asarray(data(64)), batch_sharding(mesh))
    step = jax.jit(lambda s, x: sdegen.train_step(s, model, transform, x, None, key))
    text = step.lower(state, x0).compile().as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in COLLECTIVES[1:])


def test_the_sampler_and_the_train_step_lower_for_accelerators():
    model, transform = denoiser(), sdegen.Lion().transform(10)
    key, x0 = jax.random.key(0), jnp.asarray(data(16))
    sampler = jax.jit(
        lambda key, start: (
            sdegen.sample(
                key,
                model,
                (16, 2),
                solver=dfx.ShARK(),
                grid=sdegen.LogSNRGrid(4),
                stochasticity=1.0,
                start=start,
            ).x
        )
    )
    leaves, structure = jax.tree.flatten(sdegen.init_state(model.network, transform))

    @jax.jit
    def step(leaves, x0):
        state = jax.tree.unflatten(structure, leaves)
        state, metrics = sdegen.train_step(state, model, transform, x0, None, key)
        return jax.tree.leaves(state), metrics

    for function, arguments in ((sampler, (key, x0)), (step, (leaves, x0))):
        exported = jax.export.export(function, platforms=["cuda", "tpu"])(*arguments)
        assert exported.platforms == ("cuda", "tpu")
        assert "stablehlo" in exported.mlir_module()


def test_the_unet_lowers_for_accelerators():
    network = nets.Unet(channels=8, blocks=1)((8, 8, 1), jax.random.key(0))
    model = sdegen.Denoiser(network, sdegen.EDM())
    x0 = jnp.zeros((4, 8, 8, 1))
    grads = jax.jit(
        jax.grad(lambda x: sdegen.denoising_loss(model, jax.random.key(0), x))
    )
    exported = jax.export.export(grads, platforms=["cuda", "tpu"])(x0)
    assert exported.platforms == ("cuda", "tpu")
