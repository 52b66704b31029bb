"""A schedule with parameters: its bound sees the ends, its variance sees the rest.

For Gaussian data N(0, s^2) in d dimensions with sigma_data = s the network F = 0 is the
exact denoiser, and with m(gamma) = s^2 / (s^2 + e^gamma), E|z - z_hat|^2 = d m:

    E[l] = d/2 int m dgamma = d/2 [log(s^2 + e^gamma) - gamma] from gamma_1 to gamma_0.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import sdegen
from sdegen.losses.variational import diffusion_term

S, D = 0.3, 16


class Affine(eqx.Module):
    """w x: exact for w = 0."""

    w: jax.Array

    def __call__(self, t, x, cond):
        return self.w * x


def model(gamma=None, w=0.0):
    gamma = sdegen.Gamma() if gamma is None else gamma
    return sdegen.VDM(Affine(jnp.asarray(w)), gamma, sigma_data=S)


def crooked():
    """The same ends, another inside."""
    one = sdegen.Gamma()
    return sdegen.Gamma(one.ends, one.heights + jnp.linspace(4.0, -2.0, 32))


def integral(ends, s=S):
    a, b = np.asarray(ends, float)
    return 0.5 * ((np.log(s**2 + np.exp(a)) - a) - (np.log(s**2 + np.exp(b)) - b))


@eqx.filter_jit
def terms(model, t, x0, z):
    return diffusion_term(model.denoiser, t, x0, z)


@eqx.filter_jit
def described(gamma, ts):
    path, one = sdegen.LearnedSchedule(gamma), jnp.ones(())

    def at(t):
        slope = jax.grad(gamma)(t)
        scales = path.alpha(t), path.sigma(t), path.logsnr(t)
        return gamma(t), slope, *scales, path.drift(t, one), path.diffusion(t, one)

    return jax.vmap(at)(ts)


def test_gamma_rises_from_end_to_end_and_gives_the_log_snr():
    ts = jnp.linspace(0.0, 1.0, 101)
    for gamma in (sdegen.Gamma(), crooked()):
        values, slopes, alpha, sigma, logsnr, f, g = map(
            np.asarray, described(gamma, ts)
        )
        np.testing.assert_allclose(values[[0, -1]], [-13.3, 6.5], atol=1e-12)
        assert (np.diff(values) > 0).all()
        np.testing.assert_allclose(logsnr, -values, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-12)
        # f = -gamma' sigma^2 / 2 and g^2 = gamma' sigma^2
        np.testing.assert_allclose(f, -slopes * sigma**2 / 2, rtol=1e-9)
        np.testing.assert_allclose(g**2, slopes * sigma**2, rtol=1e-9)
    assert abs(values[50] + 4.15) > 1  # the second is far from a line


def test_the_bound_does_not_see_the_inside_of_the_schedule():
    # l is quadratic in (x0, z), so two points each give its mean; Gauss-Legendre in t.
    nodes, weights = np.polynomial.legendre.leggauss(400)
    t, weights = (nodes + 1) / 2, weights / 2
    signs = [(a, b) for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    for w in (0.0, 0.4):  # an exact and a wrong network
        found = []
        for gamma in (sdegen.Gamma(), crooked()):
            each = [
                terms(model(gamma, w), t, *(jnp.full((400, 1), c) for c in (S * a, b)))
                for a, b in signs
            ]
            found.append(weights @ np.mean(each, axis=0))
        assert abs(found[1] / found[0] - 1) < 1e-6
        exact = integral((-13.3, 6.5))
        assert abs(found[0] / exact - 1) < 1e-6 if w == 0 else found[0] > 1.01 * exact


def test_the_loss_is_the_bound_of_the_library_in_nats_per_coordinate():
    key = jax.random.key(0)
    x0 = S * jax.random.normal(key, (2000, D))
    loss = jax.jit(lambda k, x0: sdegen.vdm_loss(model(), k, x0))
    values = np.array([loss(jax.random.key(i), x0) for i in range(8)])
    bound = sdegen.variational_bound(
        model().denoiser, x0, key=key, draws=4, uniform_in="t"
    )
    exact = float(-bound.value.mean()) / D
    error = np.hypot(
        values.std() / np.sqrt(8), float(bound.standard_error.mean()) / D / 2000**0.5
    )
    assert abs(values.mean() - exact) < 5 * error
    assert error < 0.02
    # with the exact denoiser it is the entropy, up to the ends
    entropy = float(np.mean(0.5 * np.log(2 * np.pi * S**2) + x0**2 / (2 * S**2)))
    assert abs(values.mean() - entropy) < 5 * error + 1e-3


def test_gradients_go_where_they_belong():
    x0 = S * jax.random.normal(jax.random.key(0), (512, D))

    @jax.jit
    def parts(network):
        """The bound without tricks, and the second moment of its estimate."""
        own = sdegen.VDM(*network, sigma_data=S)
        return sdegen.vdm_loss(own, jax.random.key(1), x0)

    value, grad = jax.value_and_grad(parts)(model(w=0.3).trained)
    net, gamma = grad
    h = 1e-5

    def at(w, ends):
        start = sdegen.Gamma()
        return parts(model(sdegen.Gamma(start.ends + ends, start.heights), w).trained)

    finite = (at(0.3 + h, 0.0) - at(0.3 - h, 0.0)) / (2 * h)
    np.testing.assert_allclose(net.w, finite, rtol=1e-5)
    for i in range(2):  # the ends have the gradient of the value
        step = h * np.eye(2)[i]
        finite = (at(0.3, step) - at(0.3, -step)) / (2 * h)
        np.testing.assert_allclose(gamma.ends[i], finite, rtol=1e-4)
    # the inside has not: its gradient is that of the second moment of l
    key, total = jax.random.split(jax.random.key(1), 3), 512
    t = sdegen.times.Uniform().draw(key[0], model().denoiser.path, jnp.arange(512), 512)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key[1], jnp.arange(total))
    z = jax.vmap(lambda k: jax.random.normal(k, (D,)))(keys)

    @jax.jit
    def moment(heights):
        own = model(sdegen.Gamma(heights=heights), 0.3)
        l = diffusion_term(own.denoiser, t, x0, z)
        return jnp.mean(l**2) / jax.lax.stop_gradient(jnp.mean(l)) ** 2

    np.testing.assert_allclose(
        gamma.heights, jax.grad(moment)(sdegen.Gamma().heights), rtol=1e-8, atol=1e-12
    )
    assert np.isfinite(value)


def test_training_lowers_the_variance_and_keeps_the_mean():
    x0 = S * jax.random.normal(jax.random.key(0), (4096, D))
    t = (jnp.arange(4096) + 0.5) / 4096
    z = jax.random.normal(jax.random.key(1), x0.shape)

    def relative_variance(model):
        l = np.asarray(terms(model, t, x0, z))
        return l.var() / l.mean() ** 2

    fit = sdegen.fit(
        model(),
        x0,
        steps=200,
        batch_size=256,
        loss=sdegen.vdm_loss,
        optimizer=sdegen.AdamW(learning_rate=3e-2, warmup=10),
        ema=0.9,
        progress=False,
    )
    network, gamma = fit.model.trained
    assert abs(network.w) < 0.02  # exact before, exact after
    before, after = relative_variance(model()), relative_variance(fit.model)
    assert before > 0.6  # 2 / D is the part of the noise, which no schedule removes
    assert after - 2 / D < 0.3 * (before - 2 / D)
    # with the old ends the inside alone did it, and the mean stayed what it was
    inside = model(eqx.tree_at(lambda g: g.ends, gamma, sdegen.Gamma().ends))
    assert relative_variance(inside) - 2 / D < 0.35 * (before - 2 / D)
    l = np.asarray(terms(inside, t, x0, z))
    error = np.sqrt(2 / D / 4096) * l.mean() + 0.01 * l.std()
    assert abs(l.mean() / D - integral((-13.3, 6.5))) < 5 * error / D
    out = sdegen.sample(jax.random.key(2), fit.model.denoiser, (2000, D))
    assert abs(float(out.x.std()) / S - 1) < 5 / np.sqrt(2 * 2000 * D) + 0.01
