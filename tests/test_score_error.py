"""The score's error and the Wasserstein distance that it bounds, in closed form."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import exact
from oracle import G1, Mixture1D

import sdegen
from sdegen import prediction
from sdegen.data import Mixture

KEY = jax.random.key(0)


class GivenScore(sdegen.AbstractDenoiser):
    """A denoiser from its score, a function of (t, x)."""

    path: sdegen.AbstractPath
    params: object
    fn: object = eqx.field(static=True)

    def posterior_means(self, t, x, cond=None):
        sigma = self.path.sigma(t)
        z = -sigma * self.fn(t, x, self.params)
        return (x - sigma * z) / self.path.alpha(t), z


def nodes(law, order=60):
    """Pairs (x0, z) and weights that integrate smooth functions of both exactly."""
    g, w = np.polynomial.hermite_e.hermegauss(order)
    w = w / w.sum()
    x0 = (law.mu[:, None] + law.s[:, None] * g).ravel()
    wx = (law.w[:, None] * w).ravel()
    grid = np.meshgrid(x0, g, indexing="ij")
    return *(jnp.asarray(a.ravel()[:, None]) for a in grid), jnp.asarray(
        np.outer(wx, w).ravel()
    )


def wave(t, x, params):
    return -params[0] * x + params[1] * jnp.sin(x)


def test_conditional_and_true_score_matching_differ_by_a_constant():
    """VP, t = 0.3, J = 0.89268, C = 0.76386, whatever the model."""
    path = sdegen.VP()
    mixture = Mixture(G1.w, G1.mu[:, None], G1.s)
    x0, z, weights = nodes(G1)
    truth, t = mixture.denoiser(path), 0.3

    def terms(params):
        model = GivenScore(path, params, wave)
        return sdegen.score_error(model, truth, t, x0, z, weights=weights)

    for params in ((1.0, 0.0), (0.3, 0.7), (2.0, -1.0)):
        found = terms(jnp.asarray(params))
        assert abs(found.conditional - found.matching - found.irreducible) < 1e-9
        assert abs(found.irreducible - 0.7638628400) < 1e-8
        fisher = 1 / path.sigma(t) ** 2 - found.irreducible
        assert abs(fisher - 0.8926801483) < 1e-8
        # independent of the library: the error by a quadrature of the known density
        x = jnp.linspace(-9, 9, 60001)
        alpha, sigma = path.alpha(t), path.sigma(t)
        square = (G1.score(x, alpha, sigma) - wave(t, x, params)) ** 2
        matching = jnp.sum(G1.pdf(x, alpha, sigma) * square) * (x[1] - x[0])
        assert abs(found.matching - matching) < 1e-8
    gap = jax.grad(lambda p: terms(p).conditional - terms(p).matching)
    assert np.abs(gap(jnp.asarray([0.3, 0.7]))).max() < 1e-7
    many = sdegen.score_error(
        GivenScore(path, jnp.asarray([1.0, 0.0]), wave),
        truth,
        jnp.asarray([0.1, 0.3]),
        x0,
        z,
        weights=weights,
    )
    assert abs(many.irreducible[1] - 0.7638628400) < 1e-8
    assert many.irreducible.shape == (2,)


def test_the_score_of_a_few_samples_is_biased_and_the_conditional_loss_is_not():
    # p_0 = N(0, 1), VP, t = .3, x = 1: the truth is -1
    path, t, x = sdegen.VP(), 0.3, jnp.ones((1, 1))
    for size, expected in ((1, -1.656), (4, -1.125), (16, -1.029)):

        def plug_in(key, size=size):
            x0 = jax.random.normal(key, (size, 1))
            law = Mixture(jnp.ones(size) / size, x0, jnp.zeros(size))
            return law.denoiser(path).score(jnp.asarray(t), x)[0, 0]

        found = jax.vmap(plug_in)(jax.random.split(KEY, 20_000))
        bar = float(found.std()) / np.sqrt(len(found))
        assert abs(found.mean() - expected) < 4 * bar + 5e-4, size


def test_another_coupling_has_another_exact_denoiser():
    model = sdegen.Denoiser(lambda t, x, c: x, sdegen.VP())

    def sorted_pairs(key, x0, z):
        return jnp.sort(x0, axis=0), jnp.sort(z, axis=0)

    with pytest.raises(ValueError, match="another coupling has another one"):
        sdegen.denoising_loss(
            model, KEY, jnp.ones((4, 1)), coupling=sorted_pairs, exact=model
        )


def test_the_loss_without_its_irreducible_part():
    path = sdegen.VP()
    law = Mixture(G1.w, G1.mu[:, None], G1.s)
    truth, x0 = law.denoiser(path), law.sample(KEY, 20_000)

    def network(time, x, cond):
        return 0.3 * x

    model = sdegen.Denoiser(network, path, prediction.eps, inputs=sdegen.raw_inputs)
    loss = sdegen.denoising_loss(model, KEY, x0)
    excess = sdegen.denoising_loss(model, KEY, x0, exact=truth)
    # the mean of sigma^2 C(t) over t in [t_min, t_max], by quadrature
    points, w = np.polynomial.legendre.leggauss(80)
    ts = jnp.asarray((points + 1) / 2)
    x, z, weights = nodes(G1)
    terms = sdegen.score_error(truth, truth, ts, x, z, weights=weights)
    constant = np.sum(w / 2 * terms.irreducible * jax.vmap(path.sigma)(ts) ** 2)
    print(f"loss {loss:.4f}, excess {excess:.4f}, irreducible {constant:.4f}")
    assert abs(loss - excess - constant) < 0.02 * constant
    assert 0 < excess < loss

    def perfect(time, x, cond):
        return truth.eps(time, x)

    model = sdegen.Denoiser(perfect, path, prediction.eps, inputs=sdegen.raw_inputs)
    assert sdegen.denoising_loss(model, KEY, x0, exact=truth) < 1e-20


# -- the Wasserstein bound, on VP with p_0 = p_T = N(0, 1) -----------------------------


def affine(t, x, params):
    return -params[0] * x + params[1]


def switching(t, x, params):
    return -x + params[1] * jnp.sign(0.7 - t)


@functools.cache
def path():
    # the closed forms start at t = 0
    return sdegen.VP(t_min=1e-9)


def gaussian_nodes(d):
    g, w = np.polynomial.hermite_e.hermegauss(3)
    grid = np.stack(np.meshgrid(*[g] * (2 * d), indexing="ij")).reshape(2 * d, -1).T
    weights = np.prod(np.meshgrid(*[w / w.sum()] * (2 * d), indexing="ij"), axis=0)
    return jnp.asarray(grid[:, :d]), jnp.asarray(grid[:, d:]), jnp.asarray(weights)


def bound(slope, shift, stochasticity=0.0, fn=affine, **options):
    slope = jnp.asarray(slope, float)
    d = slope.size
    x0, z, weights = gaussian_nodes(d)
    model = GivenScore(path(), (jnp.broadcast_to(slope, d), jnp.asarray(shift)), fn)
    truth = GivenScore(path(), (jnp.ones(d), jnp.zeros(())), affine)
    return sdegen.wasserstein_bound(
        model,
        truth,
        x0,
        z,
        weights=weights.reshape(-1),
        stochasticity=stochasticity,
        **options,
    )


@pytest.mark.parametrize(
    "slope, shift, stochasticity, expected",
    [
        (1.0, 0.1, 0.0, 0.5025),  # tight: W2 is the same number
        (1.0, 0.1, 1.0, 0.198685683),  # tight
        (1.2, 0.0, 0.0, 0.633955365),  # tight
        (0.8, 0.0, 0.0, 1.731907273),  # tight
        (1.2, 0.0, 1.0, 0.285462709),
        (0.8, 0.0, 1.0, 0.633969443),
        ([1.2, 0.8], 0.0, 0.0, 2.449286754),
    ],
)
def test_the_bound_in_closed_form(slope, shift, stochasticity, expected):
    found = bound(slope, shift, stochasticity)
    assert bool(found.ok)
    assert abs(found.value - expected) < 1e-8, float(found.value) - expected


def test_a_switching_error_is_bounded_and_far_from_tight():
    assert abs(bound(1.0, 0.1, fn=switching).value - 0.5025) < 1e-8


def test_a_wrong_start_grows_or_shrinks_with_the_model_s_field():
    # s_hat = -(1 + delta) x: I(T) = exp(-B delta / 2)
    found = bound(1.2, 0.0, start=0.3)
    assert abs(found.growth - np.exp(-1.005)) < 1e-8
    assert abs(found.from_noise - 0.3 * np.exp(-1.005)) < 1e-8
    assert abs(found.value - found.from_score - found.from_noise) < 1e-12


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_the_distance_of_samples_is_below_the_bound(stochasticity):
    """A model with a wrong score on a mixture: W2 on the line is that of quantiles."""
    path, n = sdegen.VP(), 4000
    law = Mixture1D([0.3, 0.7], [-0.5, 0.3], [0.5, 0.6])
    # one program samples both: the shift is a number of the denoiser
    truth, model = exact(path, law), exact(path, law, shift=0.05)
    x0, z = law.sample(KEY, n)[:, None], jax.random.normal(jax.random.key(1), (n, 1))
    found = sdegen.wasserstein_bound(model, truth, x0, z, stochasticity=stochasticity)
    start = path.alpha(path.t_max) * x0 + path.sigma(path.t_max) * z
    options = {"start": start, "stochasticity": stochasticity}
    ours = sdegen.sample(KEY, model, (n, 1), **options)
    right = sdegen.sample(KEY, truth, (n, 1), **options)
    distance = np.sqrt(np.mean((np.sort(ours.x[:, 0]) - np.sort(right.x[:, 0])) ** 2))
    print(f"W2 {distance:.4f}, bound {found.value:.4f}")
    assert 0.02 < distance < found.value < 20 * distance


def test_bad_input_gets_a_sentence():
    x0, z, _ = gaussian_nodes(1)
    truth = GivenScore(path(), (jnp.ones(1), jnp.zeros(())), affine)
    with pytest.raises(ValueError, match="pairs x0 and z of the same shape"):
        sdegen.wasserstein_bound(truth, truth, x0[:, 0], z[:, 0])
    with pytest.raises(ValueError, match="score_error takes pairs"):
        sdegen.score_error(truth, truth, 0.3, x0[:, 0], z[:, 0])
    with pytest.raises(ValueError, match="at least one step"):
        sdegen.wasserstein_bound(truth, truth, x0, z, steps=0)
    with pytest.raises(ValueError, match="stochasticity must be >= 0"):
        sdegen.wasserstein_bound(truth, truth, x0, z, stochasticity=-1.0)
    elsewhere = GivenScore(sdegen.EDM(), (jnp.ones(1), jnp.zeros(())), affine)
    with pytest.raises(ValueError, match="two denoisers on one path, got VP and EDM"):
        sdegen.wasserstein_bound(truth, elsewhere, x0, z)
    heavy = sdegen.VP()
    heavy = eqx.tree_at(lambda p: p.noise, heavy, sdegen.StudentT())
    other = GivenScore(heavy, (jnp.ones(1), jnp.zeros(())), affine)
    with pytest.raises(ValueError, match="is for Gaussian noise, got a denoiser on VP"):
        sdegen.score_error(truth, other, 0.3, x0, z)
