"""The order of training and the data sets.

Orders against their definition (permutations), exact laws against the 1-D mixture of
`oracle`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracle import G1, G2, PROBES, PROCESSES, process
from sklearn.datasets import load_digits

from sdegen.data import Mixture, batch_indices, digits, ring

# -- the order of training -------------------------------------------------------------


@pytest.mark.parametrize("n, batch_size", [(12, 4), (10, 4), (7, 20), (5, 1), (1, 3)])
def test_every_epoch_is_a_permutation(n, batch_size):
    rows = batch_indices(3, 0, 6 * n, n=n, batch_size=batch_size)
    assert rows.shape == (6 * n, batch_size)
    for epoch in rows.reshape(-1, n):
        assert sorted(epoch) == list(range(n))


def test_epochs_come_in_different_orders():
    epochs = batch_indices(0, 0, 5, n=50, batch_size=50)
    assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_rows_depend_on_seed_and_step_alone_however_they_are_asked_for(chunk):
    ask = {"n": 23, "batch_size": 5}
    whole = batch_indices(11, 0, 42, **ask)
    parts = [batch_indices(11, step, chunk, **ask) for step in range(0, 42, chunk)]
    assert (np.concatenate(parts) == whole).all()
    assert (batch_indices(11, 40, 2, **ask) == whole[40:]).all()


def test_every_row_of_a_small_set_is_seen_equally_often_in_a_large_batch():
    (batch,) = batch_indices(0, 0, 1, n=6, batch_size=18)
    assert (np.bincount(batch, minlength=6) == 3).all()


def test_the_order_of_two_seeds_differs():
    a, b = (batch_indices(seed, 0, 1, n=100, batch_size=100)[0] for seed in (0, 1))
    agreements = int((a == b).sum())
    assert agreements <= 6  # Poisson(1): more has probability 1e-4


def test_a_late_step_costs_no_earlier_ones():
    rows = batch_indices(0, 10**9, 2, n=1000, batch_size=512)
    assert rows.min() >= 0 and rows.max() < 1000


# -- the digits ------------------------------------------------------------------------


def test_the_digits_are_two_halves_of_the_whole_set():
    (a, a_labels), (b, b_labels) = digits()
    assert (a.shape, b.shape) == ((898, 8, 8, 1), (899, 8, 8, 1))
    assert a.dtype == b.dtype == np.float32
    scans = load_digits()

    def sheets(images, labels):  # every image with its label, as one comparable thing
        return sorted(
            (*i.ravel().tolist(), k) for i, k in zip(images, labels, strict=True)
        )

    ours = sheets(np.concatenate([a, b]), np.concatenate([a_labels, b_labels]))
    # 16 levels of ink, white at 0: exact in float32
    theirs = sheets((scans.images[..., None] - 8) / 8, scans.target)
    assert ours == theirs


def test_the_digits_fill_their_range():
    (a, labels), (b, _) = digits()
    assert (a.min(), a.max(), b.min(), b.max()) == (-1, 1, -1, 1)
    assert set(labels) == set(range(10))


def test_no_digit_is_in_both_halves():
    # The scans are all different, so equal rows would be one scan used twice.
    (a, _), (b, _) = digits()
    assert len({i.tobytes() for i in np.concatenate([a, b])}) == 1797


def test_the_shuffle_of_the_digits_is_a_function_of_the_seed():
    same, again, other = (digits(seed)[0] for seed in (0, 0, 1))
    assert (same[0] == again[0]).all() and (same[1] == again[1]).all()
    assert (same[0] != other[0]).any()


# -- exact mixtures --------------------------------------------------------------------


def on_the_line(oracle):
    return Mixture(oracle.w, oracle.mu[:, None], oracle.s)


def times(path):
    """Times over the whole range, both ends included."""
    return path.t_min + np.array([0.0, 0.01, 0.3, 0.7, 1.0]) * (path.t_max - path.t_min)


@pytest.mark.parametrize("oracle", [G1, G2], ids=["G1", "G2"])
@pytest.mark.parametrize("name", PROCESSES)
def test_a_mixture_agrees_with_the_oracle_on_the_line(name, oracle):
    path, mixture = process(name), on_the_line(oracle)
    ts = times(path)
    alpha, sigma = (jax.vmap(f)(ts)[:, None, None] for f in (path.alpha, path.sigma))
    q = np.broadcast_to(PROBES, (len(ts), len(PROBES)))
    x = oracle.quantile(q, alpha, sigma)

    @jax.jit
    @jax.vmap
    def answers(t, x):
        def answer(x):
            return mixture.log_prob(path, t, x), mixture.denoise(path, t, x)[0]

        return jax.vmap(answer)(x[:, None])

    log_prob, denoised = answers(ts, x)
    assert abs(log_prob - jnp.log(oracle.pdf(x, alpha, sigma))).max() < 1e-12
    assert abs(denoised - oracle.denoise(x, alpha, sigma)).max() < 1e-12


@pytest.mark.parametrize("name", PROCESSES)
def test_the_score_of_a_mixture_in_the_plane_is_tweedies(name):
    """grad log p_t = -(x - alpha D) / sigma^2, compared in units of x."""
    path, mixture = process(name), ring()
    noise = jax.random.normal(jax.random.key(1), (16, 2))
    x0 = mixture.sample(jax.random.key(0), 16)

    @jax.jit
    @jax.vmap
    def worst(t):
        alpha, sigma = path.alpha(t), path.sigma(t)

        def error(x):
            score = jax.grad(lambda x: mixture.log_prob(path, t, x))(x)
            return sigma**2 * score - (alpha * mixture.denoise(path, t, x) - x)

        x = alpha * x0 + sigma * noise
        return abs(jax.vmap(error)(x)).max() / (1 + abs(x).max())

    assert worst(times(path)).max() < 1e-12


def test_the_density_of_a_mixture_in_space_is_scipys():
    weights, means = [0.2, 0.5, 0.3], np.random.default_rng(0).normal(size=(3, 3))
    stds, path, t = [0.3, 1.0, 0.6], process("VP"), 0.4
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    x = np.array([0.3, -0.2, 0.9])
    expected = sum(
        w
        * scipy.stats.multivariate_normal(alpha * m, (alpha * s) ** 2 + sigma**2).pdf(x)
        for w, m, s in zip(weights, means, stds, strict=True)
    )
    got = Mixture(weights, means, stds).log_prob(path, t, jnp.asarray(x))
    assert abs(got - np.log(expected)) < 1e-12


def test_draws_of_a_mixture_have_its_law():
    n = 50_000
    x = on_the_line(G1).sample(jax.random.key(0), n)[:, 0]
    q = G1.cdf(G1.quantile(PROBES))
    share = (x[:, None] <= G1.quantile(PROBES)).mean(0)
    error = 5 * np.sqrt(q * (1 - q) / n)
    print("share below each quantile, error, bar:", share, share - q, error)
    assert (abs(share - q) < error).all()


def test_draws_of_a_mixture_in_the_plane_have_its_moments():
    n, mixture = 50_000, ring()
    x = np.asarray(mixture.sample(jax.random.key(1), n))
    w, mu = np.asarray(mixture.weights), np.asarray(mixture.means)
    mean = w @ mu
    cov = (w[:, None] * mu).T @ mu + 0.1**2 * np.eye(2) - np.outer(mean, mean)
    error = 5 * np.sqrt(np.diag(cov) / n)
    print("mean", x.mean(0), "exact", mean, "bar", error)
    assert (abs(x.mean(0) - mean) < error).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    error = 5 * products.std(0) / np.sqrt(n)
    print("cov", products.mean(0), "exact", cov, "bar", error)
    assert (abs(products.mean(0) - cov) < error).all()


def test_the_modes_of_a_ring_are_on_it_and_weigh_one_to_two():
    mixture = ring(modes=5, radius=3.0, std=0.2)
    weights, means = np.asarray(mixture.weights), np.asarray(mixture.means)
    assert np.allclose(weights, np.array([4, 5, 6, 7, 8]) / 30, atol=1e-15)
    assert np.allclose(np.linalg.norm(means, axis=1), 3.0)
    turns = np.unwrap(np.arctan2(means[:, 1], means[:, 0]))
    assert np.allclose(np.diff(turns), 2 * np.pi / 5)
    assert (np.asarray(mixture.stds) == 0.2).all()
