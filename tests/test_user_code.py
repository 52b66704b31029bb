"""What a user may reasonably write: it works, or is answered with one sentence."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from oracle import G1, G2, process

import sdegen
from sdegen import nets
from sdegen.mesh import data_mesh
from sdegen.solvers.grids import whole_steps
from sdegen.typing import data_array, random_key


def narrow(path, std=0.1):
    """The exact denoiser of N(0, std^2): hard for a grid that is coarse at the ends."""

    def mean(t, x, cond):
        alpha, sigma = path.alpha(t), path.sigma(t)
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x

    return sdegen.PosteriorMean(mean, path)


@pytest.mark.parametrize("name", ["EDM", "RectifiedFlow"])
def test_the_default_grid_serves_the_flow_and_the_sde(name):
    path = process(name)
    exact = np.sqrt((path.alpha(path.t_min) * 0.1) ** 2 + path.sigma(path.t_min) ** 2)
    for strength in (0.0, 1.0):
        out = sdegen.sample(
            jax.random.key(0), narrow(path), (20_000, 1), stochasticity=strength
        )
        # three standard errors, and 2.5 % for 32 steps of Heun
        assert abs(out.x.std() / exact - 1) < 3 / np.sqrt(40_000) + 0.025


@pytest.mark.parametrize(
    "name, grid",
    [("RectifiedFlow", sdegen.UniformGrid), ("Cosine", sdegen.FlowTimeGrid)],
)
def test_a_fine_grid_near_the_noise_end_stays_finite_in_the_sde(name, grid):
    out = sdegen.sample(
        jax.random.key(0),
        G2.denoiser(process(name)),
        (4000, 1),
        solver=dfx.Euler(),
        grid=grid(2000),
        stochasticity=1.0,
    )
    assert bool(out.ok.all())
    assert abs(out.x.mean() - 1.0) < 5 * 0.5 / np.sqrt(4000) + 0.02
    assert abs(out.x.std() - 0.5) < 5 * 0.5 / np.sqrt(8000) + 0.01


def test_a_number_of_steps_is_a_grid():
    out = sdegen.sample(jax.random.key(0), G1.denoiser(process("VP")), (4, 1), grid=5)
    assert int(out.evaluations) == 5  # one evaluation a step, by default


def test_a_solve_that_is_not_finite_is_not_ok():
    broken = sdegen.PosteriorMean(lambda t, x, cond: x * jnp.nan, process("VP"))
    assert not bool(sdegen.sample(jax.random.key(0), broken, (4, 1)).ok.any())
    at_the_end = sdegen.simulate(  # f is infinite at t = 1
        jax.random.key(0),
        sdegen.RectifiedFlow(),
        jnp.ones((4, 1)),
        solver=dfx.Heun(),
        grid=20,
    )
    assert not bool(at_the_end.ok.all())


class Quadratic(sdegen.AbstractLinearSDE):
    """A user's process, with plain Python numbers as fields."""

    t_min: float = 1e-3
    t_max: float = 1.0
    noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.Gaussian)

    def alpha(self, t):
        return 1 - t**2

    def sigma(self, t):
        return t


def test_a_users_process_with_plain_numbers_samples_exactly():
    start = G1.quantile(np.array([0.1, 0.5, 0.9]))[:, None] * 0 + np.array(
        [[-1.0], [0.2], [1.3]]
    )
    path = Quadratic()
    out = sdegen.sample(
        jax.random.key(0),
        G1.denoiser(path),
        (3, 1),
        solver=dfx.Tsit5(),
        grid=sdegen.Adaptive(1e-10, 1e-10),
        start=start,
    )
    before = G1.cdf(start[:, 0], 0.0, 1.0)  # alpha(1) = 0: pure noise
    after = G1.cdf(out.x[:, 0], path.alpha(path.t_min), path.sigma(path.t_min))
    assert abs(before - after).max() < 1e-8


def test_a_flat_log_snr_is_refused():
    class Flat(Quadratic):
        def sigma(self, t):
            return jnp.minimum(t, 0.5)

        def alpha(self, t):
            return jnp.where(t < 0.5, 1 - t, 0.5)

    with pytest.raises(ValueError, match="falls as t rises"):
        Flat()


def test_a_denoiser_gives_its_score_for_one_sample_to_reverse():
    path = process("VP")
    denoiser = G2.denoiser(path)
    t, x = jnp.asarray(0.4), jnp.array([0.3])
    exact = G2.score(x, path.alpha(t), path.sigma(t))
    assert abs(denoiser.sample_score(t, x) - exact).max() < 1e-12
    noise = 1.0 * jax.random.normal(jax.random.key(0), (2000, 1))
    backward = sdegen.reverse(path, denoiser.sample_score)
    out = sdegen.simulate(jax.random.key(1), backward, noise, grid=300)
    assert abs(out.x.mean() - 1.0) < 5 * 0.5 / np.sqrt(2000) + 0.02


def test_networks_always_see_one_time_per_sample():
    seen = []

    def network(t, x, cond):
        seen.append(t.shape)
        return 0.0 * x + t[:, None]

    model = sdegen.Denoiser(network, process("VP"))
    sdegen.sample(jax.random.key(0), model, (5, 2))
    sdegen.denoising_loss(model, jax.random.key(0), jnp.zeros((5, 2)))
    assert set(seen) == {(5,)}


def fit(model=None, data=None, **options):
    network = nets.MLPConfig(width=8, depth=1)((2,), jax.random.key(0))
    model = sdegen.Denoiser(network, sdegen.VP()) if model is None else model
    data = np.ones((16, 2), np.float32) if data is None else data
    options = {"steps": 3, "batch_size": 8, "progress": False} | options
    return sdegen.fit(model, data, **options)


def test_a_number_of_steps_is_whole(float32):
    assert whole_steps(np.int64(5), "sample") == whole_steps(jnp.array(5), "") == 5
    assert sdegen.CosineGrid(np.int64(5)) == sdegen.CosineGrid(5)
    for other in (None, [1.0, 0.1], sdegen.Adaptive(), lambda path: 0, "ten"):
        assert whole_steps(other, "sample") is None
    for wrong in (10.0, 10.5, True, np.True_, 0, np.float32(3), jnp.array(2.0)):
        with pytest.raises(ValueError, match="sample needs at least one step: a num"):
            whole_steps(wrong, "sample")
    for wrong in (10.0, True):
        with pytest.raises(ValueError, match="whole number of steps >= 1"):
            sdegen.CosineGrid(wrong)


def test_a_key_may_be_its_seed(float32):
    mixture, key = sdegen.data.ring(), jax.random.key(7)
    assert (mixture.sample(7, 3) == mixture.sample(key, 3)).all()
    denoiser = mixture.denoiser(sdegen.VP())
    x, y = (sdegen.sample(k, denoiser, (4, 2), grid=5).x for k in (7, key))
    assert (x == y).all()
    sentence = r"one jax.random.key\(seed\), or the seed"
    for wrong in (None, 1.5, True, "a", jax.random.PRNGKey(0), jax.random.split(key)):
        with pytest.raises(ValueError, match=sentence):
            random_key(wrong)


class Frame:
    """What a data frame is to NumPy: an object that makes an array of itself."""

    def __array__(self, dtype=None, copy=None):
        return np.ones((4, 2), dtype or np.float64)


NO_DATA = {
    "at least one axis per sample, got shape .4,.. For 1-D data use": np.ones(4),
    r"got int64 of shape \(4, 2\). Scale it": np.ones((4, 2), int),
    "Scale it": np.ones((4, 2), np.uint8),  # a vector of bytes
    "Cast booleans": np.ones((4, 2), bool),
    "two channels": np.ones((4, 2), complex),
    "Keep what is a number": np.array([["a", 1.0]], object),
    "got dict, which is none": {"x": np.ones((4, 2))},
    "got tuple, which is none": (np.ones((4, 2)), np.ones(4)),
    "got list, which is none": [np.ones(2), np.ones(3)],
    "got NoneType": None,
}


@pytest.mark.parametrize("sentence", NO_DATA)
def test_what_is_no_data_is_named_as_it_came(sentence):
    doors = {
        "Arrays": lambda x: sdegen.data.Arrays(x),
        "fit": lambda x: data_array(x, "fit", images=True),
    }
    for name, door in doors.items():
        with pytest.raises(ValueError, match=f"{name} takes .*{sentence}"):
            door(NO_DATA[sentence])


def test_frames_lists_and_videos_of_bytes_are_data():
    assert data_array(Frame(), "fit").shape == (4, 2)
    assert data_array([[1.0, 2.0]], "fit").shape == (1, 2)
    video = np.ones((4, 3, 2, 2, 1), np.uint8)
    assert data_array(video, "fit", images=True) is video
    with pytest.raises(ValueError, match="use bits_per_dim"):
        data_array(video, "x", advice="use bits_per_dim")


def doors(cond):
    """Every verb that takes a condition, for ten samples."""
    network = lambda t, x, cond: x + 0 * cond.sum()  # noqa: E731
    model, x = sdegen.Denoiser(network, sdegen.VP()), jnp.ones((10, 2))
    key, cond = jax.random.key(0), {"cond": cond}
    known = sdegen.inverse.Measurement(lambda x: x[:1], y=jnp.ones(1), std=0.1)
    integers = np.ones((10, 2), int)
    return {
        "fit": lambda: sdegen.fit(model, x, **cond),
        "loss": lambda: sdegen.denoising_loss(model, key, x, **cond),
        "sample": lambda: sdegen.sample(key, model, (10, 2), **cond),
        "log_likelihood": lambda: sdegen.log_likelihood(model, x, **cond),
        "bits": lambda: sdegen.bits_per_dim(model, integers, key=key, **cond),
        "bound": lambda: sdegen.variational_bound(model, x, key=key, **cond),
        "score_error": lambda: sdegen.score_error(model, model, 0.5, x, x, **cond),
        "RePaint": lambda: sdegen.inverse.RePaint()(key, model, known, (10, 2), **cond),
        "denoiser": lambda: model(jnp.ones(()), x, **cond),
        "Arrays": lambda: sdegen.data.Arrays(x, **cond),
    }


@pytest.mark.parametrize("door", doors(None))
def test_a_condition_has_one_row_per_sample_at_every_door(door, float32):
    wrong = {
        r"leading axis of 10, got the shape \(5, 3\)": np.ones((5, 3)),
        r"leading axis of 10, got the shape \(3,\)": {"a": np.ones(3)},
        "A list is a tree of its items": list(range(10)),
        "arrays of numbers, got 'cat'": "cat",
        "Number the classes": np.array(["cat"] * 10),
    }
    for sentence, cond in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            doors(cond)[door]()


def test_labels_out_of_range_are_refused_where_they_have_values(float32):
    network = nets.MLPConfig(width=4, depth=1, classes=3)((2,), jax.random.key(0))
    model, labels = sdegen.Denoiser(network, sdegen.VP()), np.array([0, 4])
    key, sentence = jax.random.key(0), "labels of 3 classes are 0 to 2, or 3 for no"
    for guided in (model, sdegen.guidance.ClassifierFree(model, 3)):
        with pytest.raises(ValueError, match=sentence):
            sdegen.sample(key, guided, (2, 2), cond=labels)
    with pytest.raises(ValueError, match=sentence):
        sdegen.fit(model, jnp.ones((2, 2)), cond=labels)


def test_an_update_that_is_not_finite_is_caught_at_its_own_step(float32):
    poisoned = sdegen.AdamW(learning_rate=float("nan"), warmup=0)
    with pytest.raises(sdegen.NonFiniteError, match="step 0") as caught:
        fit(optimizer=poisoned)
    network = jax.tree.leaves(caught.value.state.trained)
    assert all(np.isfinite(leaf).all() for leaf in network)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": np.zeros((0, 2), np.float32)}, "the data are empty"),
        ({"cond": np.full((16, 1), np.nan, np.float32)}, "cond must be finite"),
        ({"mesh": jax.make_mesh((8,), ("model",))}, 'an axis "data"'),
    ],
)
def test_bad_training_input_is_answered(options, sentence, float32):
    with pytest.raises(ValueError, match=sentence):
        fit(**options)


def test_a_network_without_arrays_has_nothing_to_train(float32):
    model = sdegen.Denoiser(lambda t, x, cond: x, sdegen.VP())
    with pytest.raises(ValueError, match="nothing to train"):
        fit(model)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (nets.MLPConfig(width=8, depth=1), True),
        (nets.MLPConfig(width=8, depth=1), False),
    ],
)
def test_gradients_under_shard_map_are_those_of_one_device(make, check, float32):
    """Compares the updated network: a loss is blind to a gradient summed 8 times."""
    shape = (4, 4, 1)
    network = make(shape, jax.random.key(0))
    network = jax.tree.map(
        lambda a: a + 0.05 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), network
    )
    model = sdegen.Denoiser(network, sdegen.VP())
    transform, key = optax.sgd(0.1), jax.random.key(2)
    x0 = jax.random.normal(jax.random.key(3), (16, *shape))
    start = sdegen.init_state(network, transform)

    def step(state, x, axis_name=None):
        return sdegen.train_step(
            state, model, transform, x, None, key, axis_name=axis_name
        )

    one, _ = jax.jit(step)(start, x0)
    spread = jax.shard_map(
        lambda s, x: step(s, x, "data"),
        mesh=data_mesh(),
        in_specs=(P(), P("data")),
        out_specs=P() if not check else (P(), P()),
        check_vma=check,
    )
    many, _ = jax.jit(spread)(start, x0)
    pairs = zip(
        jax.tree.leaves(many.trained), jax.tree.leaves(one.trained), strict=True
    )
    for a, b in pairs:
        assert abs(np.asarray(a) - np.asarray(b)).max() < 2e-4
