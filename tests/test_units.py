"""The units of data: measured, told, carried through every verb, and held."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdegen
from sdegen import inverse, nets
from sdegen.data import Arrays, Mixture, ring
from sdegen.processes.normaliser import normalised

pytestmark = pytest.mark.usefixtures("float32")
SHIFT, SCALE = np.array([100.0, -3.0]), np.array([1.0, 1e3])


@functools.cache
def data():
    return np.asarray(ring().sample(jax.random.key(0), 512), np.float32)


def fit(x, path=None, **options):
    network = nets.MLPConfig(width=16)((x.shape[1],), jax.random.key(1))
    model = sdegen.Denoiser(network, path or sdegen.VP(), **options)
    return sdegen.fit(model, x, steps=8, batch_size=64, progress=False)


@functools.cache
def pair():
    """The same training in two units."""
    return fit(data()), fit((data() * SCALE + SHIFT).astype(np.float32))


def test_training_is_the_same_in_all_units():
    plain, moved = pair()
    np.testing.assert_allclose(moved.losses, plain.losses, rtol=2e-3)
    a, b = (sdegen.sample(jax.random.key(2), f.model, (64, 2)).x for f in pair())
    np.testing.assert_allclose((b - SHIFT) / SCALE, a, atol=2e-3)


def test_the_likelihood_has_the_log_determinant():
    x = jnp.asarray(data()[:4])
    moved = (x * SCALE + SHIFT).astype(jnp.float32)
    a = sdegen.log_likelihood(pair()[0].model, x, grid=16).value
    b = sdegen.log_likelihood(pair()[1].model, moved, grid=16).value
    np.testing.assert_allclose(b - a, -np.log(SCALE).sum(), atol=0.02)


def test_a_constant_coordinate_comes_back_as_it_is():
    x = np.concatenate([data(), np.full((512, 1), 7.0, np.float32)], axis=1)
    out = sdegen.sample(jax.random.key(0), fit(x).model, (16, 3), grid=4)
    assert (out.x[:, 2] == 7).all() and out.x[:, :2].std() > 0


def test_a_mixture_is_exact_in_the_units_of_a_path():
    own = ring()
    mixture = Mixture(own.weights, 10 * own.means + 3, 10 * own.stds)
    units = sdegen.Normaliser(jnp.array([3.0, -1.0]), jnp.array([10.0, 20.0]))
    path = sdegen.VP()
    x, z, t = mixture.sample(jax.random.key(0), 64), jnp.ones((64, 2)), jnp.array(0.2)
    # x in its own units under VP with the noise scaled by hand.
    alpha, sigma = path.scales(t)
    u = alpha * units.coordinates(x) + sigma * z
    x_t = alpha * x + sigma * units.scale * z
    want = jax.vmap(lambda x: mixture.posterior_mean(x, alpha, units.scale * sigma))
    found = mixture.denoiser(normalised(path, units))(t, u)
    np.testing.assert_allclose(units.data(found), want(x_t), atol=5e-3)


def test_the_variational_bound_and_the_score_error_know_the_units():
    mixture, (plain, moved) = ring(), (f.model for f in pair())
    x, key = jnp.asarray(data()[:8]), jax.random.key(0)
    there = (x * SCALE + SHIFT).astype(jnp.float32)
    a = sdegen.variational_bound(plain, x, key=key, draws=4).value
    b = sdegen.variational_bound(moved, there, key=key, draws=4).value
    np.testing.assert_allclose(b - a, -np.log(SCALE).sum(), atol=0.1)
    pairs = (0.3, x, jnp.ones_like(x))
    exact = mixture.denoiser(plain.path)
    assert sdegen.score_error(plain, exact, *pairs).matching > 0
    with pytest.raises(ValueError, match="one path"):
        sdegen.score_error(plain, mixture.denoiser(sdegen.VP()), *pairs)


def test_vdm_and_momentum_take_the_scale_of_their_data():
    x = data() * np.float32(50) + 9
    network = nets.MLPConfig(width=16)((2,), jax.random.key(1))
    options = {"steps": 2, "batch_size": 64, "progress": False}
    vdm = sdegen.fit(sdegen.VDM(network), x, **options).model
    np.testing.assert_allclose(vdm.normaliser.shift, x.mean(0), rtol=1e-5)
    cld = sdegen.fit(sdegen.Denoiser(network, sdegen.CLD()), x, **options).model
    np.testing.assert_allclose(cld.sigma_data, x.std(), rtol=1e-2)
    assert cld.normaliser is None


@pytest.mark.parametrize("per_coordinate", [None, True, False])
def test_images_share_their_units_and_vectors_do_not(per_coordinate):
    rng = np.random.default_rng(0)
    vectors, images = rng.normal(size=(9, 3)), rng.normal(size=(9, 2, 2, 1))
    for x, own in ((vectors, True), (images, False)):
        axes = 0 if (own if per_coordinate is None else per_coordinate) else None
        units = sdegen.Normaliser.of(x, per_coordinate)
        np.testing.assert_allclose(units.shift, x.mean(axes), atol=1e-6)
        np.testing.assert_allclose(units.scale, x.std(axes), rtol=1e-6)
        np.testing.assert_allclose(units.data(units.coordinates(x)), x, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_an_impossible_deviation_is_refused(bad):
    with pytest.raises(ValueError, match="positive and finite"):
        sdegen.Denoiser(None, sdegen.VP(), sigma_data=bad)
    with pytest.raises(ValueError, match="positive and finite"):
        sdegen.VDM(None, sigma_data=bad)
    if bad != 0:  # 0 is a constant coordinate
        with pytest.raises(ValueError, match="a Normaliser needs"):
            sdegen.Normaliser(0.0, bad)


def test_a_deviation_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"sigma_data has the shape \(3,\)"):
        fit(data(), sigma_data=np.ones(3))


@pytest.mark.parametrize("x", [255 * data(), Arrays(255 * data()), data() / 99])
def test_data_that_disagree_with_the_model_give_a_warning(x):
    network = nets.MLPConfig(width=16)((2,), jax.random.key(1))
    model = sdegen.Denoiser(network, sdegen.VP(), sigma_data=1.0)
    with pytest.warns(UserWarning, match="standard deviation .* sigma_data=1"):
        sdegen.fit(model, x, steps=1, batch_size=64, progress=False)


def test_what_was_told_stays():
    model = fit(data(), sigma_data=1.4).model
    assert model.normaliser is None and model.sigma_data == jnp.float32(1.4)
    again = dataclasses.replace(pair()[0].model)
    more = sdegen.fit(again, 2 * data(), steps=1, batch_size=64, progress=False)
    # Training goes on in the units of the model.
    np.testing.assert_array_equal(more.model.normaliser.scale, again.normaliser.scale)
    with pytest.raises(ValueError, match="has a Normaliser already"):
        again.normalise(sdegen.Normaliser.of(data()))


def test_edm_is_trained_at_its_own_times():
    u = (jnp.arange(999) + 0.5) / 999
    times = np.log(sdegen.times.OfProcess(0.5).quantile(sdegen.EDM(), u))
    np.testing.assert_allclose([times.mean(), times.std()], [-1.2, 1.2], atol=0.02)
    wide = np.log(sdegen.times.OfProcess(1.0).quantile(sdegen.EDM(), u))
    np.testing.assert_allclose(np.median(wide) - np.median(times), np.log(2), atol=1e-3)
    own = sdegen.times.OfProcess().quantile(sdegen.RectifiedFlow(), u)
    np.testing.assert_allclose(
        own, sdegen.times.Uniform().quantile(sdegen.RectifiedFlow(), u)
    )


@pytest.mark.parametrize(
    "method",
    [inverse.RePaint(resamples=2), inverse.PiGDM(), inverse.DPS()],
    ids=lambda m: type(m).__name__,
)
def test_inverse_problems_are_the_same_in_all_units(method):
    own, shift, scale = ring(), 7.0, 30.0
    there = Mixture(own.weights, scale * own.means + shift, scale * own.stds)
    path, seen = sdegen.VP(), lambda x: x[:1]
    moved = there.denoiser(normalised(path, sdegen.Normaliser(shift, scale)))
    y = jnp.ones((8, 1))
    a = inverse.Measurement(seen, y, std=0.1)
    b = inverse.Measurement(seen, scale * y + shift, std=0.1 * scale)
    a = method(1, own.denoiser(path), a, (8, 2), grid=6).x
    b = method(1, moved, b, (8, 2), grid=6).x
    np.testing.assert_allclose((b - shift) / scale, a, atol=5e-3)


@pytest.mark.parametrize("path", [sdegen.VP, sdegen.CLD])
def test_a_run_is_loaded_in_its_units(tmp_path, path):
    x = (data() * SCALE + SHIFT).astype(np.float32)
    network = nets.MLPConfig(width=16)((2,), jax.random.key(1))
    options = {"steps": 2, "batch_size": 64, "progress": False}
    model = sdegen.Denoiser(network, path())
    trained = sdegen.fit(model, x, directory=tmp_path, **options).model
    loaded = sdegen.load(tmp_path, model)
    equal = jax.tree.map(np.array_equal, *map(jax.tree.leaves, (trained, loaded)))
    assert all(equal)
