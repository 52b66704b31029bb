"""Training: the step against a hand-written one, purity, averages, and bad news."""

import dataclasses
import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sdegen
from sdegen import cli, nets, prediction
from sdegen import training as train
from sdegen.data import Arrays
from sdegen.runs import checkpoint, report
from sdegen.training import optimizer, posthoc_ema
from sdegen.training.config import configured

pytestmark = pytest.mark.usefixtures("float32")


@functools.cache
def data():
    x = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    return x * np.array([1.0, 0.3], np.float32) + 1


def denoiser(seed=0, process=None, kind=prediction.velocity):
    network = nets.MLPConfig(width=16, depth=1)((2,), jax.random.key(seed))
    return sdegen.Denoiser(network, process or sdegen.RectifiedFlow(), kind, 1.0)


def fit(model=None, **kwargs):
    options = {"steps": 20, "batch_size": 32, "progress": False, "steps_per_call": 5}
    return sdegen.fit(model or denoiser(), data(), **options | kwargs)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_step_is_gradient_descent_on_the_loss():
    """SGD through `train_step` against the update computed by finite differences."""
    model, key = denoiser(), jax.random.key(3)
    transform, rate = optax.sgd(1e-1), 1e-1
    x0 = jnp.asarray(data()[:64])
    state = sdegen.init_state(model.network, transform)
    new, metrics = jax.jit(
        lambda s: sdegen.train_step(s, model, transform, x0, None, key)
    )(state)

    @jax.jit
    def loss(network):
        full = dataclasses.replace(model, network=network)
        return sdegen.denoising_loss(full, jax.random.fold_in(key, 0), x0)

    chex.assert_trees_all_close(metrics["loss"], loss(model.network), rtol=1e-6)
    # along the step itself: loss falls by rate |grad|^2 to first order
    drop = loss(model.network) - loss(new.trained)
    expected = rate * metrics["grad_norm"] ** 2
    assert 0.7 * expected < drop < 1.05 * expected
    moved = optimizer.global_norm(
        jax.tree.map(lambda a, b: a - b, new.trained, model.network)
    )
    chex.assert_trees_all_close(moved, rate * metrics["grad_norm"], rtol=1e-5)
    assert int(new.step) == 1


def test_training_is_a_function_of_the_seed_and_not_of_the_chunking():
    runs = [fit(steps_per_call=n) for n in (1, 7, 20)]
    for run in runs[1:]:
        chex.assert_trees_all_close(
            leaves(run.state), leaves(runs[0].state), rtol=1e-5, atol=1e-6
        )
    again = fit(steps_per_call=1)
    chex.assert_trees_all_equal(leaves(again.state), leaves(runs[0].state))
    assert not np.allclose(fit(seed=1).losses, runs[0].losses)


def test_every_step_has_a_key_of_its_own():
    def draw(model, key, x0, cond=None, axis_name=None):
        return jax.random.uniform(key)

    assert len(np.unique(fit(loss=draw).losses)) == 20


def test_the_caller_keeps_its_network():
    model = denoiser()
    before = leaves(model.network)
    fit(model)
    chex.assert_trees_all_equal(leaves(model.network), before)  # not donated away


def test_the_average_follows_its_warmed_up_decay():
    """ema_n = d ema + (1 - d) theta_n with d = min(decay, (1 + n) / (10 + n))."""
    decay, average = 0.3, leaves(denoiser().network)
    # a constant rate, so that a run of n steps is the beginning of a longer one
    constant = sdegen.AdamW(warmup=0, decay=False)
    states = [fit(steps=n, ema=decay, optimizer=constant).state for n in (1, 2, 3)]
    for n, state in enumerate(states):
        d = min(decay, (1 + n) / (10 + n))
        pairs = zip(average, leaves(state.trained), strict=True)
        average = [d * a + (1 - d) * b for a, b in pairs]
    chex.assert_trees_all_close(
        leaves(states[-1].averages[0]), average, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("optimizer", [sdegen.AdamW(), sdegen.Lion(), optax.adam(3e-3)])
def test_training_reaches_the_posterior_mean_of_a_gaussian(optimizer):
    """The learned denoiser against alpha v x / (alpha^2 v + sigma^2)."""
    law = 2.0 * jax.random.normal(jax.random.key(0), (4000, 1))
    network = nets.MLPConfig(width=32, depth=1)((1,), jax.random.key(0))
    # predicting v with a wrong sigma_data: at its start the network knows nothing
    model = sdegen.Denoiser(network, sdegen.VP(), prediction.v, sigma_data=1.0)
    run = sdegen.fit(
        model,
        law,
        steps=1500,
        batch_size=256,
        optimizer=optimizer,
        ema=0.98,
        progress=False,
        steps_per_call=500,
    )
    x = jnp.linspace(-2, 2, 9)[:, None]
    t = jnp.asarray(0.3)
    alpha, sigma = model.path.alpha(t), model.path.sigma(t)
    v = float(law.var())
    exact = alpha * v * x / (alpha**2 * v + sigma**2)
    assert float(jnp.abs(run.model(t, x) - exact).max()) < 0.15
    assert float(jnp.abs(model(t, x) - exact).max()) > 0.3  # it had to learn it


def test_a_config_its_fields_by_name_and_both_are_the_same():
    config = train.TrainingConfig(steps=20, batch_size=32, steps_per_call=5, seed=3)
    one = sdegen.fit(denoiser(), data(), config, progress=False)
    two = fit(seed=3)
    both = sdegen.fit(
        denoiser(), data(), dataclasses.replace(config, seed=1), seed=3, progress=False
    )
    for run in (two, both):
        chex.assert_trees_all_equal(leaves(run.state), leaves(one.state))
    with pytest.raises(TypeError, match="fit has no argument 'batchsize'.*batch_size?"):
        fit(batchsize=3)
    with pytest.raises(TypeError, match="config of fit is a TrainingConfig, got 300"):
        # Through `configured`: under pytest beartype would speak before `fit` does.
        configured(sdegen.TrainingConfig, 300, {}, "fit")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment whose training is a block of flags."""

    out: str = "runs"
    training: train.TrainingConfig = dataclasses.field(
        default_factory=lambda: train.TrainingConfig(steps=300)
    )


def test_a_config_is_a_block_of_flags():
    words = "training.optimizer:lion --training.steps 7 --training.ema 0.9"
    words += " --training.optimizer.learning-rate 0.5"
    found = cli.parse(Experiment, words.split()).training
    assert (found.steps, found.ema, found.batch_size) == (7, 0.9, 128)
    assert isinstance(found.optimizer, sdegen.Lion)
    assert float(found.optimizer.learning_rate) == 0.5
    with pytest.raises(SystemExit):
        cli.parse(Experiment, ["--training.steps", "0"])


def test_values_do_not_retrace_and_structure_does(monkeypatch):
    traces = 0

    def loss(model, key, x0, cond, axis_name=None):
        nonlocal traces
        traces += 1
        return sdegen.denoising_loss(model, key, x0, cond)

    fit(loss=loss)
    first = traces
    fit(loss=loss, optimizer=sdegen.AdamW(learning_rate=5e-3, weight_decay=0.1))
    fit(loss=loss, seed=5, ema=0.9)
    vp = [denoiser(process=sdegen.VP(beta_max=b)) for b in (20.0, 15.0)]
    assert traces == first
    fit(vp[0], loss=loss)
    second = traces
    assert second > first
    fit(vp[1], loss=loss)
    assert traces == second


def broken(model, key, x0, cond, axis_name=None, *, bad_step):
    """A loss whose value turns NaN at one step of the run (key 0)."""
    value = sdegen.denoising_loss(model, key, x0, cond)
    bad_key = jax.random.fold_in(jax.random.key(0), bad_step)
    hit = jnp.all(jax.random.key_data(key) == jax.random.key_data(bad_key))
    return jnp.where(hit, jnp.nan, value)


def test_a_run_that_turns_non_finite_stops_and_keeps_the_last_good_state(tmp_path):
    loss = functools.partial(broken, bad_step=8)
    constant = sdegen.AdamW(warmup=0, decay=False)
    with pytest.raises(
        sdegen.NonFiniteError, match="step 8 gave a loss of nan"
    ) as caught:
        fit(loss=loss, optimizer=constant, directory=tmp_path)
    error = caught.value
    assert error.step == 8 and int(error.state.step) == 8
    good = fit(steps=8, optimizer=constant, steps_per_call=8).state
    chex.assert_trees_all_close(leaves(error.state), leaves(good), rtol=1e-5, atol=1e-6)
    saved = checkpoint.restore(tmp_path / "last_good", good)
    chex.assert_trees_all_equal(leaves(saved), leaves(error.state))


def test_a_gradient_that_turns_non_finite_is_caught_before_it_reaches_the_network():
    @jax.custom_vjp
    def poison(x):
        return x

    poison.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.inf,))

    def loss(model, key, x0, cond, axis_name=None):
        return poison(sdegen.denoising_loss(model, key, x0, cond))

    with pytest.raises(sdegen.NonFiniteError, match="step 0") as caught:
        fit(loss=loss)
    assert all(np.isfinite(leaf).all() for leaf in leaves(caught.value.state))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": np.full((50, 2), np.nan, np.float32)}, "row 0 holds NaN"),
        ({"data": np.zeros((50, 2), np.uint8)}, "floating-point data"),
        ({"data": np.zeros(50, np.float32)}, "at least two axes"),
        ({"cond": np.zeros((3, 1), np.float32)}, "one row per sample"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"steps": 0}, "steps >= 1"),
    ],
)
def test_bad_input_is_answered_with_a_sentence(change, sentence, tmp_path):
    options = {"data": data(), "steps": 2, "directory": tmp_path} | change
    with pytest.raises(ValueError, match=sentence):
        sdegen.fit(denoiser(), progress=False, **options)
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_rows_are_written_as_training_goes(tmp_path):
    with sdegen.Recorder(tmp_path) as recorder:
        run = fit(recorder=recorder)
    import json

    rows = [json.loads(r) for r in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    chunks = run.losses.reshape(4, 5).mean(1)
    chex.assert_trees_all_close(np.array([r["loss"] for r in rows]), chunks, rtol=1e-5)


def test_conditions_reach_the_network():
    """Two classes at -3 and +3, told apart by the condition alone."""
    label = np.arange(400) % 2
    x = 6.0 * label[:, None] - 3 + 0.1 * np.random.default_rng(0).normal(size=(400, 1))
    cond = np.eye(2, dtype=np.float32)[label]
    network = nets.init(
        lambda rngs: nets.MLP((1,), width=32, depth=1, cond_dim=2, rngs=rngs),
        jax.random.key(0),
    )
    model = sdegen.Denoiser(network, sdegen.RectifiedFlow(), sigma_data=3.0)
    run = sdegen.fit(
        model, x.astype(np.float32), cond=cond, steps=600, progress=False, ema=0.98
    )
    for k in (0, 1):
        wanted = jnp.tile(cond[k], (64, 1))
        out = sdegen.sample(jax.random.key(1), run.model, (64, 1), cond=wanted)
        assert abs(float(out.x.mean()) - (6.0 * k - 3)) < 0.3


class Mean(sdegen.AbstractModel):
    """A user's model: one array is trained, a number beside it is not."""

    network: jax.Array
    shift: jax.Array = sdegen.number(1.0)

    def loss(self, key, x0, cond=None, *, axis_name=None):
        return jnp.mean((self.network + self.shift - x0) ** 2)


class Shifted(Mean):
    """The same where both are trained, with a field that converts what it is given."""

    @property
    def trainable(self):
        return ("network", "shift")


def test_a_users_model_is_fitted_by_its_own_loss():
    options = {"steps": 300, "batch_size": 200, "progress": False}
    run = sdegen.fit(Mean(jnp.zeros(2)), data(), optimizer=optax.sgd(0.1), **options)
    chex.assert_trees_all_close(run.state.trained, data().mean(0) - 1, atol=1e-4)
    assert run.model.shift == 1.0
    run = sdegen.fit(Shifted(jnp.zeros(2)), data(), optimizer=optax.sgd(0.1), **options)
    network, shift = run.state.trained
    chex.assert_trees_all_close(network + shift, data().mean(0), atol=1e-4)
    chex.assert_trees_all_close(run.model.shift, shift, rtol=1e-5)
    assert abs(shift - 1) > 0.01


def test_what_is_no_model_is_answered_with_a_sentence():
    class Bare(eqx.Module):
        network: jax.Array

    with pytest.raises(ValueError, match="training takes an sdegen.AbstractModel"):
        fit(Bare(jnp.zeros(2)))
    with pytest.raises(AttributeError, match="the trained model is `Fit.model`"):
        fit(steps=1).denoiser  # noqa: B018


def test_make_call_is_what_fit_runs():
    feed = train.Feed(data(), None, batch_size=32, seed=0, mesh=None)
    call, flat, to_state = train.make_call(denoiser(), feed, steps=20)
    from sdegen.data import batch_indices

    index = batch_indices(0, 0, 20, n=len(data()), batch_size=32)
    flat, metrics = call(flat, jnp.asarray(index))
    run = fit(steps_per_call=20)
    chex.assert_trees_all_close(np.asarray(metrics["loss"]), run.losses, rtol=1e-5)
    state = to_state(flat)
    chex.assert_trees_all_close(leaves(state), leaves(run.state), rtol=1e-5)


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16])
def test_parameters_keep_their_precision_and_data_theirs(kind):
    """With JAX_ENABLE_X64 the numbers of the optimiser are float64, and the data."""
    with jax.enable_x64(True):
        network = jax.tree.map(lambda a: a.astype(kind), denoiser().network)
        model = dataclasses.replace(denoiser(), network=network)
        x = data().astype(np.float64)
        run = sdegen.fit(
            model, x, steps=2, batch_size=8, steps_per_call=2, progress=False
        )
        assert {a.dtype for a in leaves(run.model.network)} == {jnp.dtype(kind)}
        assert run.losses.dtype == np.float64
        # moments and averages of narrow parameters are wide, or they would not move
        kept = jax.tree.leaves((run.state.averages, run.state.opt_state))
        assert {a.dtype for a in kept if a.ndim} == {jnp.dtype(jnp.float32)}
        assert sdegen.sample(jax.random.key(0), run.model, (2, 2), grid=2).ok.all()
        found = sdegen.likelihood.log_likelihood(run.model, jnp.asarray(x[:2]), grid=2)
        assert found.ok.all() and found.value.dtype == np.float64


class Concatenated(eqx.Module):
    """An Equinox MLP, whose activation functions are leaves, as a network."""

    mlp: eqx.nn.MLP

    def __call__(self, t, x, cond):
        return jax.vmap(self.mlp)(jnp.concatenate([x, t[:, None]], -1))


def test_leaves_that_are_no_arrays_stay_as_they_are(tmp_path):
    mlp = eqx.nn.MLP(3, 2, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    model = sdegen.Denoiser(Concatenated(mlp), sdegen.RectifiedFlow())
    options = {"ema": [sdegen.ema.Power(0.05), sdegen.ema.Power(0.1)], "steps": 4}
    one = fit(model, directory=tmp_path, **options)
    assert one.state.trained.mlp.activation is jnp.tanh
    again = fit(model, directory=tmp_path, **options)
    assert again.start == 4
    t, x = jnp.full(3, 0.5), jnp.ones((3, 2))
    np.testing.assert_array_equal(one.model(t, x), again.model(t, x))
    found, _ = posthoc_ema.reconstruct(tmp_path, 0.07, like=model.network)
    assert found.mlp.activation is jnp.tanh

    def trial(key, rate):
        given = {"optimizer": sdegen.AdamW(learning_rate=rate), "batch_size": 32}
        return sdegen.Training(model, data(), steps=4, **given)

    assert sdegen.sweep(trial, {"rate": [1e-3]}, progress=False).rows[0]["loss"] > 0


class Normalised(nnx.Module):
    """A network of a user with a state that is no parameter."""

    def __init__(self, rngs, layer):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.layer = layer

    def __call__(self, t, x, cond):
        return self.layer(self.linear(x))


def test_a_state_that_moves_with_the_calls_is_refused():
    for layer in (
        nnx.BatchNorm(2, rngs=nnx.Rngs(0)),
        nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
    ):
        network = Normalised(nnx.Rngs(0), layer)
        with pytest.raises(ValueError, match="moves with its calls: network.layer"):
            fit(sdegen.Denoiser(network, sdegen.VP()))


def drawn(model, key, x0, cond=None, *, axis_name=None):
    """A loss that shows its key, its batch and its model."""
    return jax.random.uniform(key) + x0.mean() + model.network.sum()


def test_the_held_out_loss_is_that_of_the_average_with_the_same_noise(tmp_path):
    model, held = Mean(jnp.zeros(2)), data()[:48]
    options = {"validate_every": 10, "seed": 3, "directory": tmp_path, "loss": drawn}
    with sdegen.Recorder(tmp_path) as recorder:
        run = fit(model, validation=held, recorder=recorder, **options)
    key = jax.random.fold_in(jax.random.key(3), 2**31 - 3)
    noise = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(2)]
    own = float(run.model.network.sum() + held.mean())  # batches of 32 and 16
    assert run.validation[20] == pytest.approx(
        own + float(2 * noise[0] + noise[1]) / 3, rel=1e-5
    )
    assert list(run.validation) == [10, 20]
    found = report.read(tmp_path)
    looks = {r["step"]: r.get("validation_loss") for r in found["rows"]}
    assert looks == {5: None, 15: None} | run.validation
    (row,) = report.summary([found])
    assert row["held out"] == run.validation[20]
    report.main([str(tmp_path), "--out", str(tmp_path / "report.png")])
    assert (tmp_path / "report.png").exists()
    assert fit(model, validation=held, **options).validation == run.validation


@pytest.mark.parametrize("how", ["patience", "stop", "watch"])
def test_training_ends_early_and_its_run_is_finished(how, tmp_path):
    """The loss at zero rises while a mean is learnt that is not zero."""
    far = np.zeros((40, 2), np.float32)
    ends = {
        "patience": {"patience": 2},
        "stop": {"stop": lambda history: len(history) == 3},
        "watch": {"watch": lambda step, _: step == 15, "watch_every": 5},
    }
    options = {"validation": far, "validate_every": 5, "optimizer": optax.sgd(0.1)}
    options |= {"directory": tmp_path, "steps": 50, "batch_size": 200, **ends[how]}
    model = Mean(jnp.full(2, -1.0))
    run = fit(model, **options)
    assert len(run.losses) == int(run.state.step) == 15 and run.stopped
    assert list(run.validation) == [5, 10, 15]
    again = fit(model, **options)
    assert again.start == 15 and not len(again.losses)
    assert again.stopped == run.stopped and again.validation == run.validation
    np.testing.assert_array_equal(again.model.network, run.model.network)


def test_held_out_data_are_checked():
    with pytest.raises(ValueError, match=r"shape of the data, \(2,\), got \(3,\)"):
        fit(validation=np.zeros((4, 3), np.float32))
    with pytest.raises(ValueError, match="give fit validation=data"):
        fit(patience=3)


def root(model, key, x0, cond=None, *, axis_name=None):
    return jnp.sqrt(0 * model.network.sum() * x0.mean())


class Scaled(Mean):
    sigma_data: jax.Array = sdegen.number(0.0)


def with_a_gap():
    return np.where(np.arange(200)[:, None] == 7, np.float32(np.nan), data())


def constant(kind, value):
    return kind(jnp.full(2, value))


CAUSES = {
    "infinity in it. Look": lambda: {"model": constant(Mean, jnp.nan)},
    "from the stream, holds NaN": lambda: {"x": Arrays(with_a_gap())},
    "whose squares float32 does": lambda: {"x": data() * np.float32(1e30)},
    "augmentation made NaN": lambda: {"augment": lambda key, x: x + jnp.nan},
    "sigma_data is 0": lambda: {"model": constant(Scaled, 1e30)},
    "its gradient is not": lambda: {"loss": root},
    "the update is not": lambda: {"optimizer": optax.sgd(1e38)},
    "before anything was learnt": lambda: {"model": constant(Mean, 1e30)},
}


@pytest.mark.parametrize("sentence", CAUSES)
def test_a_step_that_is_not_finite_is_explained_by_what_is_seen(sentence):
    given = {"model": constant(Mean, 0.0), "x": data()} | CAUSES[sentence]()
    model, x = given.pop("model"), given.pop("x")
    options = {"steps": 10, "batch_size": 50, "steps_per_call": 5, "progress": False}
    with pytest.raises(sdegen.NonFiniteError, match=sentence):
        sdegen.fit(model, x, **options, **given)


@pytest.mark.parametrize("none", [None, []])
def test_without_an_average_the_trained_weights_are_the_model(none, tmp_path):
    model = Mean(jnp.zeros(2))
    run = fit(model, ema=none, directory=tmp_path)
    assert run.state.averages == ()
    np.testing.assert_array_equal(run.model.network, run.state.trained)
    np.testing.assert_array_equal(
        sdegen.load(tmp_path, model).network, run.model.network
    )


def test_a_fit_is_shown_in_a_few_lines():
    lines = repr(fit(Mean(jnp.zeros(2)), validation=data())).splitlines()
    assert lines[0] == "Fit" and len(lines) == 7
    assert lines[2].split() == ["parameters", "2"]
    assert lines[4].split() == ["steps", "0", "to", "20"]
