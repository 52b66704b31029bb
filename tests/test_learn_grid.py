"""Learned grids against the exact flow of six modes, from starts never seen."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import KEY, exact

import sdegen
from sdegen import prediction, solvers


@pytest.fixture(scope="module")
def plane():
    """Six unequal modes, exact, with starts that no learning has seen."""
    random = np.random.default_rng(3)
    angle = np.arange(6) * np.pi / 3
    means = 0.68 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    law = sdegen.data.Mixture(
        random.dirichlet(3 * np.ones(6)), means, random.uniform(0.05, 0.15, 6)
    )
    path = sdegen.EDM()
    x0 = law.sample(jax.random.key(1), 500)
    start = x0 + path.t_max * jax.random.normal(jax.random.key(2), x0.shape)
    denoiser = law.denoiser(path)
    grid = sdegen.Adaptive(1e-7, 1e-7)
    fine = sdegen.sample(
        KEY, denoiser, start.shape, solver=dfx.Tsit5(), grid=grid, start=start
    )
    return denoiser, start, fine.x


def plane_errors(plane, **options):
    denoiser, start, fine = plane
    out = sdegen.sample(KEY, denoiser, start.shape, start=start, **options)
    square = jnp.mean((out.x - fine) ** 2, axis=1)
    return np.array([jnp.sqrt(square.mean()), jnp.sqrt(jnp.median(square))]), out


def test_ten_evaluations_beat_the_best_of_the_field(plane):
    """Better than the usual multistep methods on the usual grids."""
    usual = [
        plane_errors(plane, solver=solver, grid=grid(10)(plane[0].path))[0]
        for solver in (
            solvers.DPMSolverPP(2),
            solvers.DEIS(3),
            solvers.UniPC(3, prediction=prediction.x0),
        )
        for grid in (sdegen.LogSNRGrid, sdegen.KarrasGrid)
    ]
    solver = solvers.UniPC(2, prediction=prediction.velocity)
    ours, out = plane_errors(plane, solver=solver, grid=sdegen.CosineGrid(10))
    print("ours", ours, "best of the others", np.min(usual, axis=0))
    assert int(out.evaluations) == 10
    assert (ours < np.min(usual, axis=0) * [0.5, 0.7]).all()


@pytest.mark.parametrize("weights", [True, False])
def test_a_learned_grid_at_least_halves_the_error_on_unseen_starts(
    plane, weights, tmp_path
):
    denoiser, start, _ = plane
    solver = solvers.UniPC(2, prediction=prediction.velocity)
    stock, _ = plane_errors(plane, solver=solver, grid=sdegen.CosineGrid(5))
    grid = sdegen.learn_grid(
        jax.random.key(3),
        denoiser,
        solver,
        5,
        shape=(2,),
        weights=weights,
        iterations=100,
        draws=1024,
        kept=256,
        progress=False,
    )
    learned, out = plane_errors(plane, grid=grid)
    print("stock", stock, "learned", learned)
    assert int(out.evaluations) == 5
    assert (learned < stock * (0.4 if weights else 0.75)).all()
    times = np.asarray(grid(denoiser.path))
    assert times[0] == 80.0 and times[-1] == np.float64(denoiser.path.t_min)
    assert (np.diff(times) < 0).all()
    again = sdegen.load_grid(grid.save(tmp_path / "grid.json"), solver)
    with pytest.raises(ValueError, match="learned for UniPC.*velocity.*got DDIM"):
        sdegen.load_grid(tmp_path / "grid.json", solvers.DDIM())
    same, repeated = plane_errors(plane, grid=again)
    assert (out.x == repeated.x).all()
    if weights:
        with pytest.raises(ValueError, match="learned for 5 steps"):
            plane_errors(plane, solver=grid.solver, grid=sdegen.CosineGrid(6))


def test_learning_says_what_it_needs():
    denoiser = exact("VP")
    with pytest.raises(ValueError, match="shape of one sample"):
        sdegen.learn_grid(KEY, denoiser)
    with pytest.raises(ValueError, match="no whole number of steps"):
        sdegen.learn_grid(KEY, denoiser, solvers.EDMHeun(), 7, shape=(1,))
    with pytest.raises(ValueError, match="adds noise"):
        sdegen.learn_grid(KEY, denoiser, solvers.Langevin(), 8, shape=(1,))
