"""Moving averages against sums written out, and those found after training."""

import contextlib
import functools
import io
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdegen
from sdegen import nets, prediction
from sdegen.mesh import make_mesh, parameter_sharding
from sdegen.runs import checkpoint
from sdegen.training import ema, posthoc_ema
from sdegen.training.ema import Decay, Power

# -- the profile -----------------------------------------------------------------------


def test_the_exponents_of_the_paper():
    found = [float(ema.exponent(std)) for std in (0.05, 0.10)]
    np.testing.assert_allclose(found, [16.97, 6.94], atol=0.005)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.10, 0.15, 0.2, 0.25, 0.279])
def test_the_width_is_the_standard_deviation_of_the_profile(std):
    """Moments of t^g on [0, 1] by quadrature, nothing of equation (2)."""
    g = float(ema.exponent(std))
    points, weights = np.polynomial.legendre.leggauss(400)
    t, weights = (points + 1) / 2, weights / 2
    mass = weights @ t**g
    mean = weights @ t ** (g + 1) / mass
    variance = weights @ ((t - mean) ** 2 * t**g) / mass
    np.testing.assert_allclose(np.sqrt(variance), std, rtol=1e-6)


# -- the recursion ---------------------------------------------------------------------


def run_average(averages, thetas):
    """The averages of a sequence, as the training step makes them."""
    start = jnp.full_like(thetas[0], 1e3)  # which no average may remember

    def body(old, item):
        n, new = item
        moving = ema.update(averages, old, {"w": new, "count": n}, n)
        return moving, None

    n = jnp.arange(1, len(thetas) + 1).astype(thetas.dtype)
    old = tuple({"w": start, "count": n[0]} for _ in averages)
    return jax.jit(lambda: jax.lax.scan(body, old, (n, thetas))[0])()


def sequence(steps=300, size=3):
    return np.random.default_rng(0).normal(size=(steps, size))


@pytest.mark.parametrize("std", [0.03, 0.05, 0.10, 0.25])
def test_a_power_average_weighs_step_k_by_the_profile_between_k_minus_1_and_k(std):
    """The weights, written out: the integral of (g + 1) t^g / N^(g + 1)."""
    thetas = sequence()
    g, n = float(ema.exponent(jnp.asarray(std))), len(thetas)
    edges = (np.arange(n + 1) / n) ** (g + 1)
    (found,) = run_average([Power(std)], jnp.asarray(thetas))
    np.testing.assert_allclose(found["w"], np.diff(edges) @ thetas, rtol=0, atol=1e-12)
    # in proportion to k^g, up to the discrete correction of a relative g / (2 k)
    late = np.arange(n // 2, n) + 1
    ratio = np.diff(edges)[late - 1] / (late / n) ** g * n / (g + 1)
    np.testing.assert_allclose(ratio, 1 - g / (2 * late), atol=g**2 / (4 * n) ** 1.5)


def test_a_constant_decay_forgets_its_start_and_then_keeps_its_length():
    for steps in (20, 2000):
        thetas = sequence(steps)
        (found,) = run_average([Decay(0.98)], jnp.asarray(thetas))
        # written out as a product, from the last step backwards
        n = np.arange(1, steps + 1)
        kept = np.minimum(0.98, n / (9 + n))
        after = np.append(np.cumprod(kept[::-1])[::-1][1:], 1.0)
        weights = (1 - kept) * after
        expected = weights @ thetas + 1e3 * np.prod(kept)
        np.testing.assert_allclose(found["w"], expected, atol=1e-11)
    # the start has lost all but nothing: 0.1 * 2/11 * ..., then 0.98 a step
    assert np.prod(kept) < 1e-15
    np.testing.assert_allclose(weights[-1] / weights[-2], 1 / 0.98, rtol=1e-12)


def test_several_averages_at_once_are_each_alone():
    thetas = jnp.asarray(sequence())
    several = [Power(0.05), Decay(0.9), Power(0.12)]
    together = run_average(several, thetas)
    for one, found in zip(several, together, strict=True):
        (alone,) = run_average([one], thetas)
        np.testing.assert_array_equal(found["w"], alone["w"])
    assert np.ptp([np.asarray(a["w"])[0] for a in together]) > 1e-3


def test_what_is_no_floating_point_array_follows():
    old, new = {"w": jnp.ones(2), "n": jnp.array(1)}, {"w": jnp.zeros(2), "n": 5}
    (moved,) = ema.update([Decay(0.5)], [old], new, 100)
    assert moved["n"] == 5
    np.testing.assert_allclose(moved["w"], 0.5)


@pytest.mark.parametrize("std", [0.05, 0.10, 0.2])
def test_float32_keeps_the_share_of_a_late_step(std):
    """1 - 1/n alone loses a part in thirty of 1/n at a million steps."""
    g = max(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real)
    for n in (1, 2, 10, 1_000, 1_000_000, 10_000_000):
        share = Power(np.float32(std)).share(jnp.float32(n))
        exact = 1 - (1 - 1 / n) ** (g + 1)
        np.testing.assert_allclose(float(share), exact, rtol=2e-5)


def test_decays_and_widths_out_of_range_are_refused():
    for std in (0.0, -0.1, 0.3, 5.0):
        with pytest.raises(ValueError, match="between 0 and 0.28"):
            Power(std)
    for decay in (1.0, -0.1, 999):
        with pytest.raises(ValueError, match="0 <= decay < 1"):
            ema.as_averages([0.9, decay])


# -- averages after training -----------------------------------------------------------

SAVED = [(n * 1000 // 32, std) for n in range(1, 33) for std in (0.05, 0.10)]


@functools.cache
def trajectory():
    """Parameters of a training run: decaying, turning, and a little noise."""
    t = np.linspace(0, 1, 1000)[:, None]
    random = np.random.default_rng(1)
    rate, turn = random.uniform(1, 8, (2, 1, 20))
    walk = np.cumsum(random.normal(size=(1000, 20)), axis=0) / 100
    return np.exp(-rate * t) * np.cos(turn * t) + 0.3 * walk


def averaged(std, step):
    """The average itself, by the weights written out, in float64."""
    g = max(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real)
    edges = (np.arange(step + 1) / step) ** (g + 1)
    return np.diff(edges) @ trajectory()[:step]


def error_of(std, step=1000):
    saved = [(n, s) for n, s in SAVED if n <= step]
    weights, error = ema.posthoc_weights(*zip(*saved, strict=True), step, std)
    found = weights @ np.stack([averaged(s, n) for n, s in saved])
    wanted = averaged(std, step)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted), error, weights


@pytest.mark.parametrize(
    ("std", "tolerance"),
    [(0.06, 1e-4), (0.08, 1e-4), (0.12, 1e-4), (0.15, 1e-4), (0.20, 5e-3)],
)
def test_32_snapshots_of_two_widths_give_the_others(std, tolerance):
    off, error, weights = error_of(std)
    print(f"std {std}: {off:.1e} of the parameters, {error:.1e} of the profile")
    assert off < tolerance
    assert error < 30 * tolerance
    np.testing.assert_allclose(weights.sum(), 1, atol=tolerance)


def test_a_width_that_is_too_large_is_said_by_the_error():
    """The early part of a long average lies before the first snapshots."""
    errors = [error_of(std)[1] for std in (0.15, 0.20, 0.25)]
    assert errors[0] < errors[1] / 2 < errors[2] / 4
    assert error_of(0.25)[0] > 10 * error_of(0.15)[0]


def test_an_average_up_to_an_earlier_step():
    off, _, weights = error_of(0.08, step=SAVED[40][0])
    assert off < 3e-4 and len(weights) == 42


def test_a_saved_average_is_itself():
    _, error, weights = error_of(0.05)
    assert error < 1e-6
    expected = np.zeros(64)
    expected[62] = 1  # the last of the first width
    np.testing.assert_allclose(weights, expected, atol=1e-5)


# -- of a real run ---------------------------------------------------------------------


def denoiser():
    network = nets.MLPConfig(width=32, depth=1)((2,), jax.random.key(0))
    return sdegen.Denoiser(network, sdegen.RectifiedFlow(), prediction.velocity, 1.0)


class Third(ema.AbstractAverage):
    """An average of width 0.08 that leaves no snapshots: what they have to give."""

    def share(self, n):
        return 1 - (1 - 1 / n) ** (1 + max(np.roots([1, 7, -140.25, -144.25]).real))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(directory, fit): three averages, of which the third checks the first two."""
    directory = tmp_path_factory.mktemp("averages")
    data = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    with jax.enable_x64(False):
        fit = sdegen.fit(
            denoiser(),
            data,
            steps=160,
            batch_size=16,
            steps_per_call=10,
            ema=[Power(0.05), Power(0.10), Third(), 0.9],
            directory=directory,
            snapshot_every=10,
            save_every=160,
            progress=False,
        )
    return directory, fit


def difference(found, wanted):
    """The relative difference of two networks' parameters."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    off = sum(np.sum((a - b) ** 2) for a, b in pairs)
    return np.sqrt(off / sum(np.sum(b**2) for _, b in pairs))


def test_a_run_gives_the_average_that_it_might_have_kept(trained, float32):
    directory, fit = trained
    steps, stds = posthoc_ema.snapshots(directory)
    assert steps == list(range(10, 161, 10))
    np.testing.assert_allclose(stds, [0.05, 0.10])
    found, error = posthoc_ema.reconstruct(directory, 0.08, denoiser().network)
    wanted = fit.state.averages[2]
    off = difference(found, wanted)
    others = [difference(fit.state.averages[i], wanted) for i in (0, 1)]
    print(f"off by {off:.1e}, the saved ones by {others[0]:.1e} and {others[1]:.1e}")
    assert off < 1e-4 and off < min(others) / 30 and error < 1e-2
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    # and the network acts
    chex.assert_trees_all_close(
        found(jnp.ones(3), jnp.ones((3, 2))),
        wanted(jnp.ones(3), jnp.ones((3, 2))),
        atol=1e-3,
    )


def test_the_shardings_of_the_network_are_kept(trained, float32):
    directory, fit = trained
    mesh = make_mesh("fsdp:8")
    like = nets.MLPConfig(width=32, depth=1)((2,), jax.random.key(1), mesh=mesh)
    wanted = parameter_sharding(like, mesh)
    found, _ = posthoc_ema.reconstruct(directory, 0.08, like)
    assert difference(found, fit.state.averages[2]) < 1e-4
    same = jax.tree.map(
        lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), found, wanted
    )
    assert all(jax.tree.leaves(same))
    assert any(
        a.addressable_shards[0].data.size == a.size // 8 for a in jax.tree.leaves(found)
    )


def test_a_network_of_another_shape_is_refused(trained, float32):
    directory, _ = trained
    like = nets.MLPConfig(width=16, depth=1)((2,), jax.random.key(1))
    with pytest.raises(ValueError):
        posthoc_ema.reconstruct(directory, 0.08, like)


def test_bfloat16_averages_are_summed_in_float32(tmp_path, float32):
    """Weights of both signs: a sum in bfloat16 would be off by hundredths."""
    identity = {"stds": [0.05, 0.10]}
    place = checkpoint.Checkpoints(tmp_path / "averages", keep=None, identity=identity)
    a = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.bfloat16)
    for step in range(10, 60, 10):
        arrays = {f"{j}['w']": a for j in (0, 1)} | {f"{j}['n']": step for j in (0, 1)}
        place.save(step, jax.tree.map(jnp.asarray, arrays))
    place.close()
    found, _ = posthoc_ema.reconstruct(tmp_path, 0.07)
    assert found["['w']"].dtype == jnp.bfloat16 and found["['n']"] == 50
    np.testing.assert_allclose(
        np.asarray(found["['w']"], np.float32), np.asarray(a, np.float32), rtol=8e-3
    )


def test_more_than_ten_averages_keep_their_numbers():
    arrays = {f"{j}['w']": j for j in range(12)}
    for j in (0, 1, 10, 11):
        assert posthoc_ema._part(arrays, j) == {"['w']": j}


# -- from the shell --------------------------------------------------------------------


def command(*words):
    """What the command line prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        posthoc_ema.main([str(word) for word in words])
    return out.getvalue()


def test_the_command_writes_checkpoints_of_the_network(trained, float32, tmp_path):
    directory, fit = trained
    said = command(directory, "--std", 0.08, "--out", tmp_path)
    assert "16 snapshots of the widths 0.05, 0.1, to step 160" in said
    places = re.findall(r"^(/\S+)  \(the profile is met to", said, re.MULTILINE)
    assert [place.rsplit("/")[-1] for place in places] == ["std-0.080-step-160"]
    found = checkpoint.restore(places[0], denoiser().network)
    assert difference(found, fit.state.averages[2]) < 1e-4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--std", 0.5), "std must be between 0 and 0.28, got 0.5"),
        (("--std", 0.1, "--step", 0), "step must be between 10 and 160.*got 0"),
        (("--std", 0.1, "--step", 400), "step must be between 10 and 160.*got 400"),
    ],
)
def test_mistakes_are_sentences(trained, words, sentence):
    with pytest.raises(SystemExit, match=sentence):
        command(trained[0], *words)


def test_a_directory_without_snapshots_is_named(tmp_path):
    with pytest.raises(SystemExit, match="error: no snapshots of averages in .*Power"):
        command(tmp_path, "--std", 0.1)
    assert not list(tmp_path.iterdir())
