"""One batch for every loss: targets, times, meshes, and models that do not fit."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sdegen
from sdegen import coupling, losses, times
from sdegen.mesh import make_mesh

KEY = jax.random.key(0)
X0 = jnp.asarray(np.random.default_rng(0).normal(size=(32, 2)) + [1.0, -0.5])


class Net(eqx.Module):
    """(t, x, cond) -> scale x + shift t, so that times are seen."""

    scale: jax.Array = sdegen.number(0.7)
    shift: jax.Array = sdegen.number(0.3)

    def __call__(self, t, x, cond):
        return self.scale * x + self.shift * t[:, None]


def ornstein_uhlenbeck():
    return sdegen.CustomSDE(
        lambda t, x, p: -x, lambda t, x, p: jnp.sqrt(2.0) + 0 * x, t_max=4.0
    )


@functools.cache
def models():
    return {
        "denoising_loss": sdegen.Denoiser(Net(), sdegen.VP(), sdegen.prediction.v),
        "velocity_loss": sdegen.VelocityModel(
            Net(), sdegen.StochasticInterpolant(), Net()
        ),
        "bridge_loss": sdegen.SchroedingerBridge(Net(), Net(), 0.7),
        "vdm_loss": sdegen.VDM(Net()),
        "simulated_score_loss": sdegen.ScoreModel.from_data(
            Net(), ornstein_uhlenbeck(), X0, KEY, steps=40
        ),
    }


LOSSES = (
    "denoising_loss",
    "velocity_loss",
    "bridge_loss",
    "vdm_loss",
    "simulated_score_loss",
)


def batch_of(name, **options):
    return losses.draw_batch(models()[name], KEY, X0, **options)


@pytest.mark.parametrize("name", LOSSES[:4])
def test_every_loss_draws_the_times_that_it_is_given(name):
    """Stratified times have one in each of the cells; independent ones do not."""
    loss, model = getattr(sdegen, name), models()[name]
    low, high = 0.0, 1.0
    if name == "denoising_loss":
        low, high = model.path.t_min, model.path.t_max

    def cells(**options):
        t = batch_of(name, **options).t
        return sorted(np.floor((t - low) / (high - low) * 32).astype(int))

    free = times.Uniform(stratified=False)
    assert cells() == cells(times=times.Uniform()) == list(range(32))
    assert cells(times=free) != list(range(32))
    values = [loss(model, KEY, X0, times=t) for t in (None, times.Uniform(), free)]
    assert values[0] == values[1] and abs(values[2] - values[0]) > 1e-6


def test_losses_are_the_regression_on_the_target():
    def square(name, output):
        batch = batch_of(name)
        error = output(models()[name])(batch.t, batch.x_t) - batch.target
        return jnp.mean(error**2), models()[name]

    found, model = square("denoising_loss", lambda m: m.predict)
    assert abs(found - sdegen.denoising_loss(model, KEY, X0)) < 1e-12
    found, model = square("velocity_loss", lambda m: m.velocity)
    batch = batch_of("velocity_loss")
    latent = jnp.mean((model.latent(batch.t, batch.x_t) - batch.z) ** 2)
    loss = sdegen.velocity_loss(model, KEY, X0, antithetic=False)
    assert abs(found + latent - loss) < 1e-12


@pytest.mark.parametrize("name", LOSSES[:4])
def test_x_t_and_the_target_are_those_of_the_equations(name):
    """Those of a ScoreModel are tested in test_nonlinear.py."""
    model, batch = models()[name], batch_of(name)
    t, x0, x = batch.t[:, None], batch.x0, batch.x_t
    if name in ("denoising_loss", "vdm_loss"):
        path, row = model.path, model.prediction.row
        alpha, sigma = jax.vmap(path.level)(batch.t)
        np.testing.assert_allclose(x, alpha[:, None] * x0 + sigma[:, None] * batch.x1)
        a, b = jax.vmap(lambda t: row(path, t, model.data_scale))(batch.t)
        exact = a[:, None] * x0 + b[:, None] * batch.x1
        np.testing.assert_allclose(batch.target, exact, rtol=1e-12)
    if name == "bridge_loss":  # equation (2) of sdegen.models.bridge
        down, up = batch.target
        np.testing.assert_allclose(down, (x0 - x) / t, rtol=1e-9)
        np.testing.assert_allclose(up, (batch.x1 - x) / (1 - t), rtol=1e-9)
    if name == "velocity_loss":
        path = model.interpolant
        one = functools.partial(path.point, x0=x0[0], x1=batch.x1[0], z=batch.z[0])
        _, slope = jax.jvp(one, (batch.t[0],), (jnp.ones(()),))
        np.testing.assert_allclose(batch.target[0], slope, rtol=1e-9)


def test_a_batch_is_the_same_on_a_mesh():
    mesh, names = make_mesh("data:4"), ("denoising_loss", "bridge_loss")
    for name in (*names, "simulated_score_loss"):
        whole = batch_of(name)
        parts = jax.shard_map(
            lambda x, name=name: losses.draw_batch(
                models()[name], KEY, x, axis_name="data"
            ),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
            check_vma=False,
        )
        split = jax.jit(parts)(X0)
        for a, b in zip(
            jax.tree.leaves(whole._replace(keys=None)),
            jax.tree.leaves(split._replace(keys=None)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        assert (
            jax.random.key_data(whole.keys) == jax.random.key_data(split.keys)
        ).all()


def test_a_model_may_draw_its_own_batches():
    class Own(sdegen.AbstractModel):
        network: jax.Array

        def draw_batch(self, key, x0, cond, *, coupling, times, axis_name):
            t = jax.random.uniform(key, (len(x0),))
            return losses.Batch(t, t[:, None] * x0, x0, x0, None, None, cond, key, {})

    batch = losses.draw_batch(Own(jnp.zeros(2)), KEY, X0)
    np.testing.assert_array_equal(batch.x_t, batch.t[:, None] * X0)


def wrong(name):
    return lambda: getattr(sdegen, name)(models()[OTHER[name]], KEY, X0)


OTHER = dict(zip(LOSSES, LOSSES[1:] + LOSSES[:1], strict=True))
REFUSED = {
    f"{name} trains a model that has .* Its own loss is {OTHER[name]}": wrong(name)
    for name in LOSSES
} | {
    "sliced_score_loss trains a model that has": lambda: sdegen.sliced_score_loss(
        models()["vdm_loss"], KEY, X0
    ),
    "Its own loss is its method `loss`": lambda: sdegen.velocity_loss(Net(), KEY, X0),
    "draw_batch knows no batch of Net": lambda: losses.draw_batch(Net(), KEY, X0),
    "takes floating-point data, got int": lambda: losses.draw_batch(
        models()["vdm_loss"], KEY, jnp.ones((4, 2), int)
    ),
    "takes no coupling and no times": lambda: batch_of(
        "simulated_score_loss", coupling=coupling.EntropicOT()
    ),
    "is a mean over uniform times": lambda: sdegen.vdm_loss(
        models()["vdm_loss"], KEY, X0, times=times.LogNormal()
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_answered_with_a_sentence(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


@pytest.mark.parametrize("path", [sdegen.VP(), sdegen.PoissonFlow(3.0)])
def test_a_stable_target_is_the_posterior_mean_over_the_batch(path):
    x0 = jax.random.normal(jax.random.key(0), (8, 2))
    model = sdegen.Denoiser(Net(), path)

    def mean(t, x, cond):  # by Bayes
        alpha, sigma = (np.asarray(a)[:, None] for a in jax.vmap(path.scales)(t))
        size = np.square(x[:, None] - alpha[..., None] * x0).sum(2) / sigma**2
        if path.noise.gaussian:
            share = np.exp(-size / 2)
        else:
            share = (1 + size / 3.0) ** (-(3.0 + 2) / 2)
        return jnp.asarray(share / share.sum(1, keepdims=True)) @ x0

    exact = sdegen.PosteriorMean(mean, path)
    found = sdegen.denoising_loss(model, 3, x0, stable=True)
    np.testing.assert_allclose(
        found, sdegen.denoising_loss(model, 3, x0, exact=exact), rtol=1e-5
    )
    assert abs(found / sdegen.denoising_loss(model, 3, x0) - 1) > 1e-3
    with pytest.raises(ValueError, match="neither cond nor exact"):
        sdegen.denoising_loss(model, 3, x0, stable=True, exact=exact)
