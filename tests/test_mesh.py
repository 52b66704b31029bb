"""Eight simulated devices: the numbers of one, no collectives where none belong."""

import collections
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
from sdegen.data.batches import batch_indices
from sdegen.mesh import (
    batch_sharding,
    data_mesh,
    make_mesh,
    parameter_sharding,
    place,
    replicated,
)
from sdegen.training import Feed, make_call

pytestmark = pytest.mark.usefixtures("float32")
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")


@functools.cache
def denoiser():
    network = nets.MLPConfig(width=16, depth=1)((2,), jax.random.key(0))
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
    compiled = sampler.lower(key).compile()
    chex.assert_trees_all_close(np.asarray(compiled(key)), np.asarray(one), atol=2e-6)
    assert not any(word in compiled.as_text() for word in COLLECTIVES)


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
    "adaptive Tsit5": {
        "solver": dfx.Tsit5(),
        "grid": sdegen.Adaptive(1e-3, 1e-3),
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
    pairs = (jax.tree.leaves(run.state.trained) for run in (many, one))
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
        jax.tree.leaves(states.trained), jax.tree.leaves(state.trained), strict=True
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
    network = nets.UNetConfig(channels=8, blocks=1)((8, 8, 1), jax.random.key(0))
    model = sdegen.Denoiser(network, sdegen.EDM())
    x0 = jnp.zeros((4, 8, 8, 1))
    grads = jax.jit(
        jax.grad(lambda x: sdegen.denoising_loss(model, jax.random.key(0), x))
    )
    exported = jax.export.export(grads, platforms=["cuda", "tpu"])(x0)
    assert exported.platforms == ("cuda", "tpu")


# -- meshes and how arrays lie on them -------------------------------------------------


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("data:2,fsdp:4", {"data": 2, "fsdp": 4}),
        ("fsdp", {"fsdp": 8}),
        (" data:2 , fsdp ", {"data": 2, "fsdp": 4}),
        ("data:-1,fsdp:2", {"data": 4, "fsdp": 2}),
        ("trial:2,data:3", {"trial": 2, "data": 3}),
        ({"fsdp": 4}, {"fsdp": 4}),
    ],
)
def test_a_mesh_is_written_as_its_axes(text, axes):
    mesh = make_mesh(text)
    assert dict(mesh.shape) == axes
    assert list(mesh.axis_names) == list(axes)
    first = jax.devices()[: mesh.size]
    assert set(mesh.devices.flat) == set(first)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data:2;fsdp:4", "a mesh is written as its axes"),
        ("8", "a mesh is written as its axes"),
        ("data:two", "a mesh is written as its axes"),
        ("data:--2", "a mesh is written as its axes"),
        ("data:2,data:4", "a mesh is written as its axes"),
        ("data,fsdp", "only one axis of a mesh can take the rest"),
        ("data:3,fsdp:3", "asked for a mesh of 9 devices, 8 are here .data:3, fsdp:3"),
        ("data:9,fsdp", "asked for a mesh of 9 devices"),
        ("data:0", "asked for a mesh of 0 devices"),
        ("", "asked for a mesh"),
    ],
)
def test_mistakes_in_a_mesh_are_sentences(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_mesh(text)


def test_the_largest_axis_that_the_devices_divide_is_split():
    mesh = make_mesh("data:2,fsdp:4")
    expected = {
        (128, 64): P("fsdp"),
        (64, 128): P(None, "fsdp"),
        (3, 3, 16, 32): P(None, None, None, "fsdp"),
        (130, 64): P(None, "fsdp"),  # 130 is not divisible by 4
        (63, 65): P(),  # nothing is
        (1023,): P(),
        (1024,): P("fsdp"),
        (16, 16): P(),  # small
        (): P(),
        (0, 2048): P(),
    }
    shapes = {k: jax.ShapeDtypeStruct(k, jnp.float32) for k in expected}
    found = parameter_sharding(shapes, mesh)
    assert {k: v.spec for k, v in found.items()} == expected
    whole = parameter_sharding(shapes, make_mesh("data:8"))
    assert all(sharding.is_fully_replicated for sharding in whole.values())


def test_arrays_keys_and_other_things_are_placed():
    mesh = make_mesh("fsdp:8")
    tree = {"w": np.ones((64, 32), np.float32), "key": jax.random.key(0), "name": "x"}
    found = place(tree, parameter_sharding(tree, mesh))
    assert found["w"].addressable_shards[0].data.shape == (8, 32)
    assert len(found["key"].sharding.device_set) == 8 and found["name"] == "x"
    again = place(found, parameter_sharding(tree, mesh))
    assert again["w"] is found["w"]  # where it lies already


# -- parameters split over the devices -------------------------------------------------

STEPS = {"steps": 8, "batch_size": 64, "steps_per_call": 4}


@functools.cache
def wide():
    """A network most of whose numbers lie in arrays large enough to be split."""
    network = nets.MLPConfig(width=64, depth=1)((2,), jax.random.key(0))
    network = jax.tree.map(
        lambda a: a + 0.05 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), network
    )
    return sdegen.Denoiser(network, sdegen.VP(), prediction.v, 1.0)


@functools.cache
def trained(spec):
    return sdegen.fit(
        wide(),
        data(),
        mesh=None if spec is None else make_mesh(spec),
        accumulate=2,
        optimizer=sdegen.AdamW(warmup=0),
        ema=[sdegen.ema.Power(0.1), 0.9],
        progress=False,
        **STEPS,
    )


@pytest.mark.parametrize("spec", ["fsdp:8", "data:2,fsdp:4"])
def test_split_parameters_train_as_on_one_device(spec):
    """In two parts, so that a part's samples are the same on any mesh, too."""
    one, many = trained(None), trained(spec)
    chex.assert_trees_all_close(many.losses, one.losses, rtol=1e-4)
    trees = [(run.state.trained, run.state.averages) for run in (many, one)]
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        chex.assert_trees_all_close(np.asarray(a), np.asarray(b), atol=2e-4)
    start = jax.tree.leaves(wide().network)
    moved = [
        np.abs(np.asarray(a) - b).max()
        for a, b in zip(jax.tree.leaves(trees[0][0]), start, strict=True)
    ]
    assert max(moved) > 2e-3  # or the comparison would see nothing


def test_the_whole_state_is_split():
    """Parameters, both averages and the optimiser's moments, an eighth on each."""
    state = trained("fsdp:8").state
    kernel = state.trained.blocks[0].up.kernel[...]
    assert kernel.shape == (64, 64)
    assert {s.data.shape for s in kernel.addressable_shards} == {(8, 64)}
    assert len({str(s.index) for s in kernel.addressable_shards}) == 8  # all of it
    for part in (state.trained, *state.averages, state.opt_state):
        leaves = jax.tree.leaves(part)
        split = [a for a in leaves if a.size >= 1024]
        assert split
        for a in split:
            assert a.addressable_shards[0].data.nbytes * 8 == a.nbytes
        here = sum(a.addressable_shards[0].data.nbytes for a in leaves)
        assert here < 0.2 * sum(a.nbytes for a in leaves)


@functools.cache
def lowered(spec):
    feed = Feed(data(), None, batch_size=64, seed=0, mesh=make_mesh(spec))
    call, leaves, _ = make_call(wide(), feed, steps=8)
    with feed.chunks(0, iter([4])) as chunks:
        return call.lower(leaves, next(chunks))


KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(text):
    """{kind: sizes of the arrays it returns}, of a compiled program."""
    found = {}
    for line in text.splitlines():
        if match := re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line):
            shapes = re.findall(r"[a-z]+[0-9]*\[([0-9,]*)\]", match[1])
            sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
            found.setdefault(match[2], []).extend(sizes)
    return found


def sizes_of(network):
    return sorted(leaf.size for leaf in jax.tree.leaves(network))


def check_sums(found, expected):
    """Each array once; two biases that are added have one gradient, and one sum."""
    found = collections.Counter(size for size in found["all-reduce"] if size > 1)
    assert found - collections.Counter(expected) == {}
    assert collections.Counter(expected) - found in ({}, {64: 1})


def test_data_parallel_training_sums_its_gradients_once():
    found = collectives(lowered("data:8").compile().as_text())
    assert found.keys() == {"all-reduce"}
    check_sums(found, sizes_of(wide().network))


@pytest.mark.parametrize(("spec", "parts"), [("fsdp:8", 8), ("data:2,fsdp:4", 4)])
def test_split_parameters_are_gathered_and_their_gradients_scattered(spec, parts):
    found = collectives(lowered(spec).compile().as_text())
    assert found.keys() == {"all-reduce", "all-gather", "reduce-scatter"}
    large = [size for size in sizes_of(wide().network) if size >= 1024]
    small = [size for size in sizes_of(wide().network) if size < 1024]
    # A CPU's compiler may make one gather of the two.
    assert set(found["all-gather"]) == set(large)
    assert len(large) <= len(found["all-gather"]) <= 2 * len(large)
    assert sorted(found["reduce-scatter"]) == [size // parts for size in large]
    # No gradient of a split array is summed whole; over "data" the parts of one are.
    check_sums(found, small + [size // 4 for size in large] * (parts == 4))


def test_whole_parameters_are_not_kept_for_the_backward_pass():
    """Every split array is gathered twice, and none is a residual."""
    text = lowered("fsdp:8").as_text()
    large = [size for size in sizes_of(wide().network) if size >= 1024]
    assert text.count("stablehlo.all_gather") >= 2 * len(large) - 2
    (kept,) = re.findall(r"optimization_barrier[^\n]*", text)
    assert "tensor<64x64xf32>" not in kept.split(" : ")[-1]


def test_the_operations_of_a_step_are_those_of_one_device():
    """An eighth of the batch each: what a speedometer divides by the peak."""
    feed = Feed(data(), None, batch_size=8, seed=0, mesh=None)
    call, leaves, _ = make_call(wide(), feed, steps=8)
    with feed.chunks(0, iter([4])) as chunks:
        alone = call.lower(leaves, next(chunks)).cost_analysis()["flops"]
    found = lowered("fsdp:8").cost_analysis()["flops"]
    np.testing.assert_allclose(found, alone, rtol=0.1)


# -- losses of a user ------------------------------------------------------------------


def noisy(denoiser, key, x0, cond, axis_name=None):
    """The same noise on every device: axis_name is not looked at."""
    z = jax.random.normal(key, x0.shape)
    return jnp.mean((denoiser.network(jnp.zeros(len(x0)), x0 + z, cond) - z) ** 2)


def deaf(denoiser, key, x0, cond, axis_name=None):
    return sdegen.denoising_loss(denoiser, key, x0, cond)


def quiet(denoiser, key, x0, cond, axis_name=None):
    """No random numbers at all."""
    return jnp.mean(denoiser.network(jnp.zeros(len(x0)), x0, cond) ** 2)


@pytest.mark.parametrize("spec", ["data:8", "fsdp:8"])
@pytest.mark.parametrize("loss", [noisy, deaf])
def test_a_loss_that_would_repeat_its_noise_on_every_device_is_refused(spec, loss):
    options = {"loss": loss, "progress": False, "batch_size": 64, "steps": 1}
    with pytest.raises(ValueError, match="every device would draw the same random"):
        sdegen.fit(wide(), data(), mesh=make_mesh(spec), **options)


def test_a_loss_without_noise_may_ignore_the_mesh():
    """Its first value is that of the whole batch."""
    options = {"loss": quiet, "progress": False, "batch_size": 64, "steps": 1}
    many = sdegen.fit(wide(), data(), mesh=make_mesh("fsdp:8"), **options)
    (rows,) = batch_indices(0, 0, 1, n=256, batch_size=64)
    one = quiet(wide(), None, jnp.asarray(data()[rows]), None)
    np.testing.assert_allclose(many.losses, [one], rtol=1e-5)
