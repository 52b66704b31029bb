"""Small mistakes in the package, and whether the tests notice them.

    python tests/mutants.py                 # all of them: half an hour on one core
    python tests/mutants.py --list          # their names, files and tests
    python tests/mutants.py cfg-off-by-one vp-double-beta
    python tests/mutants.py --unchanged     # the same tests on the package as it is
    python tests/mutants.py --jobs 1        # one at a time, which is the default

Each mutant is one replacement in one file: a sign, a missing factor, an index that is
off by one, a key that is used twice. The package and its tests are copied into a
temporary folder, the mistake is made there, and the tests that should notice run there.
The checkout is never touched. pytest does not collect this file; `test_layout.py` looks
whether every old text is still there exactly once.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("sdegen", "tests", "experiments", "pyproject.toml")
TIMEOUT = 600
"""Seconds for one run of pytest: a mutant that makes a loop endless is an error."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake.

    **Arguments:**

    - `name`: what the mistake is, for the command line.
    - `file`: the file below `sdegen/`.
    - `old`: a text that occurs in it exactly once.
    - `new`: the text in its place.
    - `tests`: what should notice, as pytest takes it, below `tests/`.
    - `known_gap`: the reason why no test notices, where that is known.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    known_gap: str = ""

    @property
    def place(self) -> str:
        """The path of the file in the checkout."""
        return f"sdegen/{self.file}"

    @property
    def words(self) -> list[str]:
        """The tests as words of pytest's command line, in the checkout."""
        return re.sub(r"\btest_\w+\.py", r"tests/\g<0>", self.tests).split()

    def changed(self, text: str) -> str:
        """The text of the file with the mistake; a `ValueError` where it does not fit.

        **Arguments:**

        - `text`: the text of the file without it.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(
                f"the mutant {self.name} needs a text that occurs once in {self.place},"
                f" and it occurs {found} times: {self.old!r}. Write it anew."
            )
        return text.replace(self.old, self.new)


PROCESSES = (
    Mutant(
        "vp-double-beta",
        "processes/vp.py",
        "jnp.exp(-0.5 * self.integrated_beta(t))",
        "jnp.exp(-self.integrated_beta(t))",
        "test_processes.py::test_coefficients_are_the_published_ones",
    ),
    Mutant(
        "ddpm-one-step-late",
        "processes/vp.py",
        "jnp.pad(jnp.cumsum(log_ratio)[:-1], (1, 0))",
        "jnp.cumsum(log_ratio)",
        "test_processes.py::test_ddpm_is_the_product_of_its_chain",
    ),
    Mutant(
        "diffusion-without-2",
        "processes/sde.py",
        "jnp.sqrt(2 * sigma * (ds",
        "jnp.sqrt(sigma * (ds",
        "test_processes.py::test_coefficients_are_the_published_ones",
    ),
    Mutant(
        "reversal-pulls-twice",
        "processes/reverse.py",
        "0.5 * (1 + self.stochasticity**2)",
        "(1 + self.stochasticity**2)",
        "test_sde.py::test_a_reversal_satisfies_the_moment_equations_of_its_path",
    ),
    Mutant(
        "reversal-without-divergence",
        "processes/reverse.py",
        "_divergence(self.sde, t, x) + g**2",
        "g**2",
        "test_sde.py::test_the_flow_keeps_quantiles_under_state_dependent_noise",
    ),
    Mutant(
        "alpha-for-sigma-in-x0",
        "processes/prediction.py",
        "(b * x - sigma * prediction) / det",
        "(b * x - alpha * prediction) / det",
        "test_prediction.py::test_all_conversions_are_round_trips",
    ),
    Mutant(
        "v-prediction-of-the-other-sign",
        "processes/prediction.py",
        "(-path.sigma(t), path.alpha(t))",
        "(path.sigma(t), -path.alpha(t))",
        "test_prediction.py::test_rows_are_the_published_predictions",
    ),
    Mutant(
        "student-t-norm-without-dimension",
        "processes/noise.py",
        "gammas - 0.5 * n * jnp.log(v * jnp.pi)",
        "gammas - 0.5 * jnp.log(v * jnp.pi)",
        "test_heavy_tails.py::test_the_kernel_is_poisson_s_and_has_mass_one",
    ),
    Mutant(
        "levy-area-without-12",
        "processes/brownian.py",
        "H=jnp.sqrt(dt / 12) * h",
        "H=jnp.sqrt(dt) * h",
        "test_brownian.py::"
        "test_levy_areas_are_normal_and_independent_of_the_increments",
    ),
    Mutant(
        "one-increment-for-all-steps",
        "processes/brownian.py",
        "jax.random.fold_in(key, cell)",
        "jax.random.fold_in(key, 0)",
        "test_brownian.py::"
        "test_increments_are_normal_and_independent_from_cell_to_cell",
    ),
    Mutant(
        "cosine-transform-transposed",
        "processes/basis.py",
        "matrix.T if inverse else matrix",
        "matrix if inverse else matrix.T",
        "test_per_coordinate.py::test_the_basis_is_the_cosine_transform",
    ),
    Mutant(
        "variance-grows-by-f-once",
        "processes/linear_sde.py",
        "[f_t, 2 * f_t + g_t**2",
        "[f_t, f_t + g_t**2",
        "test_sde.py::test_derived_marginals_are_the_known_ones",
    ),
    Mutant(
        "interpolation-in-the-next-step",
        "processes/moment_table.py",
        "first + jnp.sum(near < t), 0,",
        "first + jnp.sum(near < t) + 1, 0,",
        "test_sde.py::test_the_table_is_read_as_diffrax_reads_it",
    ),
    Mutant(
        "upper-factor-not-transposed",
        "processes/momentum.py",
        "factor[::-1, ::-1].T",
        "factor[::-1, ::-1]",
        "test_momentum.py::test_the_statistic_is_all_that_the_state_says_of_the_data",
    ),
    Mutant(
        "velocity-of-the-other-sign",
        "processes/cld.py",
        "-decay * s / root",
        "decay * s / root",
        "test_momentum.py::"
        "test_closed_form_is_the_moment_equations_is_the_matrix_exponential",
    ),
    Mutant(
        "inverse-time-without-its-slope",
        "processes/path.py",
        "return t, change / jnp.where(slope < 0, slope, -1.0)",
        "return t, -change",
        "test_processes.py::test_the_derivative_of_time_is_that_of_the_inverse",
    ),
)

SOLVERS = (
    Mutant(
        "heun-without-its-half",
        "solvers/edm.py",
        "0.5 * width * (z1 - z)",
        "width * (z1 - z)",
        "test_solver_orders.py::test_heun_has_the_golden_errors_of_edm",
    ),
    Mutant(
        "churn-to-the-raised-variance",
        "solvers/edm.py",
        "root(raised**2 - r**2)",
        "root(raised**2)",
        "test_solvers.py::test_churn_raises_the_noise_and_keeps_the_law",
    ),
    Mutant(
        "dpmpp-2m-without-its-half",
        "solvers/dpm.py",
        "y1 + 0.5 * ratio * there.a",
        "y1 + ratio * there.a",
        "test_solver_orders.py::test_errors_are_those_of_an_independent_implementation",
    ),
    Mutant(
        "history-counted-one-short",
        "solvers/multistep.py",
        "step[:, None] + 1 + np.arange",
        "step[:, None] + np.arange",
        "test_solver_orders.py::test_every_step_integrates_as_many_powers_as_it_knows_predictions",
    ),
    Mutant(
        "density-of-eps-of-the-other-sign",
        "solvers/semilinear.py",
        "lambda xi: -jnp.exp(-xi)",
        "lambda xi: jnp.exp(-xi)",
        "test_solver_orders.py::test_every_solver_has_its_order_on_every_grid",
    ),
    Mutant(
        "grid-of-one-step-more",
        "solvers/grids.py",
        ".dtype) / steps",
        ".dtype) / (steps + 1)",
        "test_processes.py::test_grids_are_equal_steps_of_their_clock",
    ),
    Mutant(
        "rho-of-karras-not-undone",
        "solvers/grids.py",
        "_fraction(path, self.steps)) ** self.rho",
        "_fraction(path, self.steps)) ** (self.rho - 1)",
        "test_processes.py::test_the_karras_grid_has_its_golden_sigmas",
    ),
    Mutant(
        "eta-not-squared",
        "solvers/ddim.py",
        "eta**2 * gain * (1 + shrink)",
        "eta * gain * (1 + shrink)",
        "test_solvers.py::test_few_steps_of_ddim_have_their_exact_variance",
    ),
    Mutant(
        "langevin-climbs-down",
        "solvers/langevin.py",
        "(term.normal(i + 1) - snr * z)",
        "(term.normal(i + 1) + snr * z)",
        "test_solvers.py::test_langevin_keeps_the_law_to_second_order_in_its_step",
    ),
    Mutant(
        "langevin-repeats-its-noise",
        "solvers/langevin.py",
        "term.normal(i + 1)",
        "term.normal()",
        "test_solvers.py::test_langevin_keeps_the_law_to_second_order_in_its_step",
    ),
    Mutant(
        "er-sde-density-without-slope",
        "solvers/er_sde.py",
        " * (1 - slope)",
        "",
        "test_solvers.py::test_er_sde_integrates_a_linear_prediction_exactly_under_noise",
    ),
    Mutant(
        "splitting-without-levy-area",
        "solvers/sscs.py",
        "area.H / length * np.sqrt(12.0)",
        "area.W / length",
        "test_momentum.py::test_the_splitting_has_its_order_and_beats_euler",
    ),
    Mutant(
        "bridge-steps-not-pinned",
        "solvers/pinned_euler.py",
        "zip((1.0, shrink), parts",
        "zip((1.0, 1.0), parts",
        "test_bridge.py::test_steps_that_are_pinned_to_the_data",
    ),
    Mutant(
        "tolerance-of-the-mean-sample",
        "solvers/solve.py",
        "jnp.max(jnp.mean(error**2",
        "jnp.mean(jnp.mean(error**2",
        "test_sample.py::test_the_tolerance_bounds_the_worst_sample",
    ),
)

LOSSES = (
    Mutant(
        "weight-of-the-other-prediction",
        "losses/weight.py",
        "source.det(path, t, sigma_data) / kind.det(path, t, sigma_data)",
        "kind.det(path, t, sigma_data) / source.det(path, t, sigma_data)",
        "test_score_matching.py::test_weights_have_their_published_values",
    ),
    Mutant(
        "min-snr-upside-down",
        "losses/weight.py",
        "path.sigma(t) ** 2 * self.gamma / path.alpha(t) ** 2",
        "path.alpha(t) ** 2 * self.gamma / path.sigma(t) ** 2",
        "test_score_matching.py::test_min_snr_on_v_is_that_of_its_paper",
    ),
    Mutant(
        "strata-of-one-device",
        "losses/times.py",
        "index.astype(dtype)) / total",
        "index.astype(dtype) % len(index)) / len(index)",
        "test_batch.py::test_a_batch_is_the_same_on_a_mesh",
    ),
    Mutant(
        "same-samples-on-every-device",
        "losses/per_sample.py",
        "index + n * jax.lax.axis_index(axis_name)",
        "index + 0 * jax.lax.axis_index(axis_name)",
        "test_batch.py::test_a_batch_is_the_same_on_a_mesh",
    ),
    Mutant(
        "one-key-for-the-batch",
        "losses/per_sample.py",
        "(None, 0))(key, index)",
        "(None, 0))(key, 0 * index)",
        "test_score_matching.py::test_times_have_their_declared_law",
    ),
    Mutant(
        "log-normal-std-is-a-variance",
        "losses/times.py",
        "log_ratio = self.mean + self.std * ndtri(u)",
        "log_ratio = self.mean + jnp.sqrt(self.std) * ndtri(u)",
        "test_score_matching.py::test_times_have_their_declared_law",
    ),
    Mutant(
        "schedule-learns-from-the-scale",
        "losses/variational.py",
        "square / jnp.mean(stop(l)) ** 2",
        "square / jnp.mean(l) ** 2",
        "test_learned_schedule.py::test_gradients_go_where_they_belong",
    ),
    Mutant(
        "bound-without-log-2-pi",
        "losses/variational.py",
        "0.5 * (np.log(2 * np.pi) - denoiser",
        "0.5 * (-denoiser",
        "test_learned_schedule.py::"
        "test_the_loss_is_the_bound_of_the_library_in_nats_per_coordinate",
    ),
    Mutant(
        "antithetic-pairs-count-twice",
        "losses/velocity.py",
        "/ 2 - (b - b_) * odd",
        "/ 2 - 2 * (b - b_) * odd",
        "test_interpolants.py::test_the_loss_regresses_on_velocity_and_noise",
    ),
    Mutant(
        "bridge-ends-swapped",
        "losses/batch.py",
        "jnp.sqrt((1 - t) / t) * z, -sigma * jnp.sqrt(t / (1 - t)) * z",
        "jnp.sqrt(t / (1 - t)) * z, -sigma * jnp.sqrt((1 - t) / t) * z",
        "test_bridge.py::test_the_loss_regresses_on_both_drifts",
    ),
    Mutant(
        "implicit-score-without-2",
        "losses/score_matching.py",
        "+ 2 * slopes.sum(0)",
        "+ slopes.sum(0)",
        "test_nonlinear.py::test_the_minimiser_of_every_loss_is_the_score",
    ),
    Mutant(
        "target-of-simulated-paths-without-dt",
        "losses/simulated_paths.py",
        "-noise / (g * dt)",
        "-noise / g",
        "test_nonlinear.py::test_targets_obey_steins_identity_for_any_weights",
    ),
    Mutant(
        "network-learns-from-the-variance",
        "losses/variational.py",
        "lambda a: stop(a) if eqx.is_array(a) else a, network)",
        "lambda a: a, network)",
        "test_learned_schedule.py::test_gradients_go_where_they_belong",
    ),
    Mutant(
        "the-dearest-matching",
        "losses/coupling/exact_ot.py",
        "linear_sum_assignment(c)[1]",
        "linear_sum_assignment(c, maximize=True)[1]",
        "test_coupling.py::test_the_matching_is_the_cheapest_of_all_permutations",
    ),
    Mutant(
        "matching-of-the-inverse-permutation",
        "losses/coupling/exact_ot.py",
        "linear_sum_assignment(c)[1]",
        "np.argsort(linear_sum_assignment(c)[1])",
        "test_coupling.py::test_the_matching_is_the_cheapest_of_all_permutations",
    ),
    Mutant(
        "draws-from-unweighted-potentials",
        "losses/coupling/entropic_ot.py",
        "jax.nn.softmax((solved.g - cost) / eps, axis=-1)",
        "jax.nn.softmax(-cost / eps, axis=-1)",
        "test_coupling.py::test_draws_follow_the_rows_of_the_plan",
    ),
)

MODELS = (
    Mutant(
        "time-of-the-network-not-over-4",
        "models/denoiser.py",
        "return log_ratio / 4,",
        "return log_ratio,",
        "test_prediction.py::test_the_network_sees_unit_variance_and_a_log_time",
    ),
    Mutant(
        "velocity-with-swapped-rates",
        "models/denoiser.py",
        "da * x0 + ds * z",
        "ds * x0 + da * z",
        "test_prediction.py::test_every_kind_becomes_the_exact_score_and_velocity",
    ),
    Mutant(
        "reverse-noise-without-root-2",
        "models/path_problem.py",
        "jnp.sqrt(2 * row.rate)",
        "jnp.sqrt(row.rate)",
        "test_sample.py::test_reverse_sde_reaches_the_law_of_the_data",
    ),
    Mutant(
        "reverse-pull-without-1-minus-tau",
        "models/path_problem.py",
        "(1 - row.tau) * (x0 - z)",
        "(x0 - z)",
        "test_sample.py::test_reverse_sde_reaches_the_law_of_the_data",
    ),
    Mutant(
        "interpolant-noise-level-not-squared",
        "models/velocity.py",
        "stochasticity**2 * pull",
        "stochasticity * pull",
        "test_interpolants.py::test_any_noise_level_ends_with_the_moments_of_the_data",
    ),
    Mutant(
        "pilot-noise-without-half",
        "models/score.py",
        "jnp.sqrt(jnp.mean(gap**2, axis=1) / 2)",
        "jnp.sqrt(jnp.mean(gap**2, axis=1))",
        "test_nonlinear.py::test_the_scales_are_the_moments_of_the_process",
    ),
)

LIKELIHOOD = (
    Mutant(
        "log-det-of-one-coordinate",
        "likelihood/coordinates.py",
        "else math.prod(shape) * log",
        "else log",
        "test_likelihood.py::test_the_exact_mode_is_exact_in_float64",
    ),
    Mutant(
        "divergence-of-the-wrong-sign",
        "likelihood/log_likelihood.py",
        "value = log_p + mean(gained)",
        "value = log_p - mean(gained)",
        "test_likelihood.py::test_the_exact_mode_is_exact_in_float64",
    ),
    Mutant(
        "standard-error-of-one-probe-more",
        "likelihood/log_likelihood.py",
        "/ max(count - 1, 1)",
        "/ (count * max(count - 1, 1))",
        "test_likelihood.py::test_probes_agree_with_the_exact_trace_and_their_error_bar_is_honest",
    ),
    Mutant(
        "bound-with-whole-log-2-pi",
        "likelihood/variational_bound.py",
        "0.5 * math.log(2 * math.pi)",
        "math.log(2 * math.pi)",
        "test_likelihood.py::test_the_bound_of_a_normal_law_is_its_entropy",
    ),
    Mutant(
        "bits-of-the-whole-image",
        "likelihood/bits_per_dim.py",
        "images[0].size * math.log(2)",
        "math.log(2)",
        "test_likelihood.py::test_bits_per_dimension_are_those_of_the_bins",
    ),
    Mutant(
        "bins-half-a-step-off",
        "likelihood/bits_per_dim.py",
        "edge = levels / (levels - 1)",
        "edge = 1.0",
        "test_likelihood.py::test_bins_are_around_the_bytes_of_fit",
    ),
    Mutant(
        "sum-of-the-draws-for-their-mean",
        "likelihood/bits_per_dim.py",
        "jax.nn.logsumexp(each, axis=0) - math.log(draws)",
        "jax.nn.logsumexp(each, axis=0)",
        "test_likelihood.py::test_bits_per_dimension_are_those_of_the_bins",
    ),
    Mutant(
        "jacobian-not-made-symmetric",
        "likelihood/score_error.py",
        "(jacobian + jnp.swapaxes(jacobian, 1, 2)) / 2",
        "jacobian + jnp.swapaxes(jacobian, 1, 2)",
        "test_score_error.py::test_the_bound_in_closed_form",
    ),
)

SAMPLING = (
    Mutant(
        "ancestral-pull-upside-down",
        "sampling/ancestral.py",
        "a1 - self.noise * a0 / s0",
        "a1 - self.noise * s0 / a0",
        "test_inverse.py::test_the_evidence_of_particles_is_the_exact_one",
    ),
    Mutant(
        "start-and-noise-share-a-key",
        "sampling/drive.py",
        "jnp.where(stage == 0, index, jnp.arange(2)[:, None])",
        "jnp.where(stage == 0, index, jnp.zeros((2, 1), int))",
        "test_sample.py::test_no_key_of_a_start_is_that_of_a_path",
    ),
    Mutant(
        "renoise-forgets-what-fades",
        "sampling/ancestral.py",
        "root(s0**2 - (k * s1) ** 2)",
        "root(s0**2 - s1**2)",
        "test_inverse.py::test_noise_is_put_back_to_the_marginals_of_the_path",
    ),
)

GUIDANCE = (
    Mutant(
        "cfg-off-by-one",
        "guidance/classifier_free.py",
        "(a + w * (a - b))",
        "(b + w * (a - b))",
        "test_guidance.py::test_classifier_free_guidance_is_the_score_of_the_powers",
    ),
    Mutant(
        "noise-not-moved-with-the-data",
        "guidance/guidance.py",
        "means[1] - ratio * shift",
        "means[1] + ratio * shift",
        "test_guidance.py::test_both_ends_agree_with_the_state",
    ),
    Mutant(
        "gradient-times-sigma-once",
        "guidance/guidance.py",
        "return sigma**2 / jnp.maximum",
        "return sigma / jnp.maximum",
        "test_guidance.py::test_a_conditional_score_is_the_score_plus_the_classifier",
    ),
    Mutant(
        "one-mask-for-all-labels",
        "guidance/label_dropout.py",
        "jax.random.uniform(k, ()))(keys)",
        "jax.random.uniform(keys[0], ()))(keys)",
        "test_guidance.py::"
        "test_dropout_hides_whole_conditions_of_its_share_on_any_mesh",
    ),
    Mutant(
        "particle-ratio-of-the-other-sign",
        "guidance/particles.py",
        "gap * (xi + gap / 2)",
        "gap * (xi - gap / 2)",
        "test_inverse.py::test_the_evidence_of_particles_is_the_exact_one",
    ),
    Mutant(
        "weights-kept-after-resampling",
        "guidance/particles.py",
        "jnp.where(low, -jnp.log(float(n)), log_weights)",
        "log_weights",
        "test_inverse.py::test_the_evidence_of_particles_is_the_exact_one",
    ),
    Mutant(
        "measurement-noise-not-squared",
        "guidance/inverse/guided.py",
        "measured.std**2 * u",
        "measured.std * u",
        "test_inverse.py::"
        "test_where_a_method_is_exact_its_denoised_point_is_the_posterior_mean",
    ),
    Mutant(
        "repaint-with-the-noise-of-step-t",
        "guidance/inverse/repaint.py",
        "alpha, sigma = path.scales(s)",
        "alpha, sigma = path.scales(path.t_max)",
        "test_inverse.py -k repaint",
    ),
    Mutant(
        "measurement-density-without-dimension",
        "guidance/inverse/measurement.py",
        "error.shape[1] * jnp.log(self.std",
        "jnp.log(self.std",
        "test_inverse.py::test_the_evidence_of_particles_is_the_exact_one",
    ),
)

CORRUPTION = (
    Mutant(
        "cold-step-with-swapped-times",
        "corruption/gaussian.py",
        "alpha_s - alpha_t * kappa",
        "alpha_t - alpha_s * kappa",
        "test_corruption.py::test_hot_is_ddim_draw_by_draw",
    ),
    Mutant(
        "edit-that-may-change-nothing",
        "corruption/edit.py",
        "randint(what_key, x0.shape, 1, self",
        "randint(what_key, x0.shape, 0, self",
        "test_corruption.py::"
        "test_exactly_so_many_tokens_are_corrupted_in_every_place_alike",
    ),
    Mutant(
        "blur-of-double-variance",
        "corruption/degradations.py",
        "jnp.asarray(sigma, x.dtype) ** 2 / 2",
        "jnp.asarray(sigma, x.dtype) ** 2",
        "test_corruption.py::test_a_blur_is_the_gaussian_filter_with_mirrored_borders",
    ),
    Mutant(
        "heat-level-off-by-one",
        "corruption/heat.py",
        "jnp.round(t * self.levels) - 1, x0)",
        "jnp.round(t * self.levels), x0)",
        "test_corruption.py::test_heat_goes_back_level_by_level_and_ends_without_noise",
    ),
    Mutant(
        "mask-loss-over-all-tokens",
        "corruption/mask.py",
        "jnp.maximum(hidden.sum(), 1)",
        "len(x)",
        "test_corruption.py::"
        "test_the_loss_of_exact_conditionals_is_the_entropy_of_a_token",
    ),
)

NETS = (
    Mutant(
        "dropout-without-its-scale",
        "nets/layers.py",
        "x / (1 - rate), 0)",
        "x, 0)",
        "test_image_nets.py::test_dropout_keeps_the_mean",
    ),
    Mutant(
        "concatenation-weighs-the-other-part",
        "nets/magnitude_preserving.py",
        "math.sqrt(na) * a, m * scale / math.sqrt(nb)",
        "math.sqrt(nb) * a, m * scale / math.sqrt(na)",
        "test_image_nets.py::test_operations_keep_magnitudes",
    ),
    Mutant(
        "weights-normalised-by-input",
        "nets/magnitude_preserving.py",
        "tuple(range(v.ndim - 1))",
        "tuple(range(1, v.ndim))",
        "test_image_nets.py::test_a_weight_counts_by_its_direction",
    ),
    Mutant(
        "patches-in-the-order-of-columns",
        "nets/dit.py",
        "x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)",
        "x.reshape(b, h // p, p, w // p, p, c).transpose(0, 3, 1, 2, 4, 5)",
        "test_image_nets.py::test_patches_are_pieces_of_the_image_in_order",
    ),
    Mutant(
        "cosines-after-sines",
        "nets/embeddings.py",
        "[jnp.cos(phase), jnp.sin(phase)]",
        "[jnp.sin(phase), jnp.cos(phase)]",
        "test_image_nets.py::test_features_of_time_are_those_of_the_papers",
    ),
    Mutant(
        "gradient-of-conv-not-flipped",
        "nets/conv.py",
        "jnp.flip(w, range(w.ndim - 2)).swapaxes(-2, -1)",
        "w.swapaxes(-2, -1)",
        "test_nets.py::test_conv_has_the_values_and_gradients_of_lax",
    ),
    Mutant(
        "steps-of-a-chain-off-by-one",
        "nets/adapter.py",
        "self.time * t - 1",
        "self.time * t",
        "test_nets.py::test_a_network_of_elsewhere_is_wrapped_by_the_names_of_its_"
        "parameters",
    ),
    Mutant(
        "no-class-is-the-first-class",
        "nets/network.py",
        "jax.nn.one_hot(cond, cond_dim",
        "jax.nn.one_hot(cond % cond_dim, cond_dim",
        "test_nets.py::test_integer_labels_are_one_hot_vectors_and_the_last_is_no_class",
    ),
    Mutant(
        "heavy-tails-skip-of-a-standard-deviation",
        "nets/heavy_tails.py",
        "data = self.sigma_data**2",
        "data = self.sigma_data",
        "test_heavy_tails.py::test_tails_keep_a_network_s_work_of_order_one",
        known_gap="that test has sigma_data = 1, which is its own square",
    ),
)

DATA = (
    Mutant(
        "last-partial-batch-dropped",
        "data/batches.py",
        "start + count * batch_size), n)",
        "start + count * batch_size), max(n - n % batch_size, 1))",
        "test_data_metrics.py::test_every_epoch_is_a_permutation",
    ),
    Mutant(
        "one-order-for-all-epochs",
        "data/batches.py",
        "_permutation(seed, epoch, n)[places",
        "_permutation(seed, 0, n)[places",
        "test_data_metrics.py::test_epochs_come_in_different_orders",
    ),
    Mutant(
        "seed-that-depends-on-the-rank",
        "data/stream.py",
        "batch_indices(seed, step, 1,",
        "batch_indices(seed + int(chosen[0]), step, 1,",
        "test_stream.py::test_the_shares_of_the_processes_are_the_global_batch",
    ),
    Mutant(
        "flip-upside-down",
        "data/augment.py",
        "x[:, ::-1]",
        "x[::-1]",
        "test_data_files.py::test_a_flip_mirrors_left_and_right_half_of_the_time",
    ),
    Mutant(
        "high-order-in-long-steps",
        "solvers/multistep.py",
        "k = jnp.max(jnp.where(fine & (count <= most), count, 1))",
        "k = jnp.max(jnp.where(count <= most, count, 1))",
        "test_solver_orders.py::"
        "test_no_solver_of_high_order_is_worse_than_ddim_in_few_steps",
    ),
    Mutant(
        "dpm-2m-in-long-steps",
        "solvers/multistep.py",
        "return jnp.where(known & fine, ratio, 0)",
        "return jnp.where(known, ratio, 0)",
        "test_solver_orders.py::"
        "test_no_solver_of_high_order_is_worse_than_ddim_in_few_steps",
    ),
    Mutant(
        "a-stable-target-of-one-sample",
        "losses/denoising.py",
        "share = jax.nn.softmax(density(batch.x0))",
        "share = jax.nn.softmax(1e6 * density(batch.x0))",
        "test_batch.py::test_a_stable_target_is_the_posterior_mean_over_the_batch",
    ),
    Mutant(
        "a-run-without-its-units",
        "training/load.py",
        "model = with_units(model, json.loads(file.read_text()))",
        "json.loads(file.read_text())",
        "test_units.py::test_a_run_is_loaded_in_its_units",
    ),
    Mutant(
        "units-without-their-log-determinant",
        "likelihood/coordinates.py",
        "log_p = log_p + basis_of(path).log_det(shape)",
        "log_p = log_p - basis_of(path).log_det(shape)",
        "test_units.py::test_the_likelihood_has_the_log_determinant",
    ),
    Mutant(
        "a-constant-coordinate-moves",
        "processes/normaliser.py",
        "eps * np.abs(shift), scale, 0.0)",
        "eps * np.abs(shift), scale, 1.0)",
        "test_units.py::test_a_constant_coordinate_comes_back_as_it_is",
    ),
    Mutant(
        "posterior-mean-without-alpha",
        "data/mixture.py",
        "return alpha * slope * x +",
        "return slope * x +",
        "test_data_metrics.py::test_the_score_of_a_mixture_in_the_plane_is_tweedies",
    ),
    Mutant(
        "images-of-cifar-transposed",
        "data/formats.py",
        ".transpose(0, 2, 3, 1), labels",
        ".transpose(0, 3, 2, 1), labels",
        "test_data_files.py::"
        "test_cifars_batches_are_read_from_the_folder_and_from_the_archive",
    ),
)

METRICS = (
    Mutant(
        "mmd-of-the-biased-estimate",
        "metrics/kernel.py",
        "(kernel(x, x) - n * own) / (n * (n - 1))",
        "kernel(x, x) / n**2",
        "test_metrics.py::test_mmd2_is_the_double_sum_over_distinct_points",
    ),
    Mutant(
        "moments-merge-with-the-other-share",
        "metrics/gaussian.py",
        "self.mean + other.count / count * gap",
        "self.mean + self.count / count * gap",
        "test_metrics.py::test_moments_merge_in_any_order",
    ),
    Mutant(
        "frechet-without-the-last-batch",
        "metrics/frechet.py",
        "range(0, len(x), size)",
        "range(0, len(x) - size + 1, size)",
        "test_metrics.py::test_features_see_one_shape_of_batch",
    ),
    Mutant(
        "sinkhorn-takes-off-both-halves",
        "metrics/sinkhorn_divergence.py",
        "xy - (xx + yy) / 2",
        "xy - (xx + yy)",
        "test_metrics.py::"
        "test_the_sinkhorn_divergence_of_a_set_from_itself_and_from_its_shift",
    ),
    Mutant(
        "neighbour-is-the-point-itself",
        "metrics/neighbours.py",
        "np.partition(d, k, axis=1)[:, k]",
        "np.partition(d, k, axis=1)[:, k - 1]",
        "test_metrics.py::test_balls_of_neighbours_counted_by_hand",
    ),
    Mutant(
        "slices-without-their-root",
        "metrics/sliced.py",
        "error / (2 * value)",
        "error / value",
        "test_metrics.py::test_the_error_of_a_sliced_distance_is_its_spread",
    ),
)

TRAINING = (
    Mutant(
        "average-biased-to-its-start",
        "training/ema.py",
        "jnp.maximum(1 - self.decay, 9 / (9 + n))",
        "1 - self.decay + 0 * n",
        "test_ema.py::"
        "test_a_constant_decay_forgets_its_start_and_then_keeps_its_length",
    ),
    Mutant(
        "average-with-share-and-decay-swapped",
        "training/ema.py",
        "a + share.astype(a.dtype) * (b - a)",
        "b + share.astype(a.dtype) * (a - b)",
        "test_train.py::test_the_average_follows_its_warmed_up_decay",
    ),
    Mutant(
        "average-one-step-late",
        "training/step.py",
        "n = (state.step + 1)",
        "n = (state.step + 2)",
        "test_train.py::test_the_average_follows_its_warmed_up_decay",
    ),
    Mutant(
        "all-parts-of-a-batch-in-the-place-of-the-first",
        "losses/per_sample.py",
        "index * part.parts + part.number",
        "index * part.parts",
        "test_resume.py::test_a_batch_in_parts_is_the_whole_batch",
    ),
    Mutant(
        "accumulation-sums",
        "training/step.py",
        "a + b / accumulate",
        "a + b",
        "test_resume.py::test_a_batch_in_parts_is_the_whole_batch",
    ),
    Mutant(
        "one-key-for-all-parts-of-a-step",
        "training/step.py",
        "jax.random.fold_in(key, j)",
        "key",
        "test_resume.py::test_a_loss_that_does_not_ask_for_its_samples_draws_in_every_part",
    ),
    Mutant(
        "one-key-for-all-steps",
        "training/compiled_loop.py",
        "x0, key = as_float(x0), jax.random.fold_in(key, step)",
        "x0 = as_float(x0)",
        "test_train.py::test_every_step_has_a_key_of_its_own",
    ),
    Mutant(
        "gradients-summed-over-devices",
        "training/compiled_loop.py",
        "return jax.lax.pmean(g, axes)",
        "return jax.lax.psum(g, axes)",
        "test_mesh.py::test_training_on_a_mesh_gives_the_numbers_of_one_device",
    ),
    Mutant(
        "warm-up-from-zero",
        "training/optimizer.py",
        "linear_schedule(1 / (warmup + 1), 1.0, warmup)",
        "linear_schedule(0.0, 1.0, warmup)",
        "test_optimizer.py::"
        "test_the_rate_rises_in_a_line_and_falls_along_a_half_cosine",
    ),
    Mutant(
        "bytes-between-zero-and-one",
        "training/feed.py",
        "/ 127.5 - 1",
        "/ 255",
        "test_resume.py::test_bytes_become_minus_one_to_one_after_their_augmentation",
    ),
    Mutant(
        "stream-resumes-at-its-beginning",
        "training/feed.py",
        "self.seed, start, batch_size=self.batch_size",
        "self.seed, 0, batch_size=self.batch_size",
        "test_resume.py::test_a_stream_is_taken_up_in_the_middle_of_an_epoch",
    ),
    Mutant(
        "pairs-swapped",
        "training/reflow.py",
        "(ends, found) if up else (found, ends)",
        "(found, ends) if up else (ends, found)",
        "test_reflow.py::test_upward_pairs_start_from_the_data",
    ),
    Mutant(
        "posthoc-weights-without-their-scale",
        "training/ema.py",
        "weights * scale[-1] / scale[:-1]",
        "weights * scale[:-1] / scale[-1]",
        "test_ema.py::test_32_snapshots_of_two_widths_give_the_others",
    ),
)

RUNS = (
    Mutant(
        "fingerprint-without-places",
        "runs/checkpoint.py",
        "* (2 * weight + 1)",
        "* (0 * weight + 1)",
        "test_resume.py::test_a_fingerprint_sees_every_bit_and_every_exchange",
    ),
    Mutant(
        "rewind-drops-its-own-step",
        "runs/recorder.py",
        'row.get("step", math.inf) <= step',
        'row.get("step", math.inf) < step',
        "test_record.py::test_rows_after_a_step_and_rows_of_the_end_are_taken_back",
    ),
    Mutant(
        "compilation-counts-as-speed",
        "runs/throughput.py",
        "self._began = now\n            return {}",
        "self._began = now",
        "test_throughput.py::test_the_first_call_compiles_and_is_not_counted",
    ),
    Mutant(
        "orders-of-two-runs-not-refused",
        "runs/recorder.py",
        'return "" if old == new else',
        'return "" if new else',
        "test_record.py::test_another_config_is_refused_by_the_name_of_its_field",
    ),
)

SWEEPS = (
    Mutant(
        "halving-keeps-the-worse",
        "sweeps/halving.py",
        '1 if goal == "min" else -1',
        '-1 if goal == "min" else 1',
        "test_sweep.py::test_halving_keeps_the_best_by_either_goal",
    ),
    Mutant(
        "all-trials-see-the-data-of-the-first",
        "sweeps/program.py",
        "[of[seed] for seed in self.seeds]",
        "[of[self.seeds[0]] for seed in self.seeds]",
        "test_sweep.py::test_every_trial_is_what_fit_gives_alone",
    ),
    Mutant(
        "logarithmic-range-drawn-evenly",
        "sweeps/space.py",
        "self.low * (self.high / self.low) ** u",
        "self.low + (self.high - self.low) * u",
        "test_sweep.py::test_drawn_points_follow_the_law_of_their_range",
    ),
    Mutant(
        "sweep-resumes-without-its-losses",
        "sweeps/job.py",
        "self.program, self.now = program, now",
        "now.tail = self.now.tail; self.program, self.now = program, now",
        "test_sweep.py::test_a_sweep_that_was_killed_goes_on_in_the_same_bits",
        known_gap="the last tenth of the losses, which is kept, is in the last call of "
        "that sweep, after its last checkpoint",
    ),
    Mutant(
        "sweep-resumes-without-its-losers",
        "sweeps/job.py",
        "self.program, self.now = program, now",
        "now.ended = {}; self.program, self.now = program, now",
        "test_sweep.py::test_a_sweep_that_was_killed_goes_on_in_the_same_bits",
    ),
)

CHECKS = (
    Mutant(
        "fokker-planck-with-whole-diffusion",
        "checks/fokker_planck.py",
        "0.25 * (D[1:] + D[:-1])",
        "0.5 * (D[1:] + D[:-1])",
        "test_check.py::test_the_grid_law_is_the_exact_one_of_ornstein_and_uhlenbeck",
    ),
    Mutant(
        "weak-form-without-its-half",
        "checks/weak_form.py",
        "b = f - 0.5 * (1 - m**2) * (div + D * score)",
        "b = f - (1 - m**2) * (div + D * score)",
        "test_check.py::test_the_weak_form_vanishes_for_all_three_generators",
    ),
    Mutant(
        "moments-without-2-sigma",
        "checks/moments.py",
        "change = 2 * sigma * table.d_sigma",
        "change = sigma * table.d_sigma",
        "test_check.py::test_a_right_process_passes_everything",
    ),
    Mutant(
        "check-that-accepts-anything",
        "checks/reversal.py",
        "KS_BAR + bias * 2 * np.sqrt(n)",
        "1000 * KS_BAR",
        "test_check.py::test_draws_of_another_law_are_not_accepted",
    ),
)

MESH_AND_CLI = (
    Mutant(
        "the-smallest-axis-is-split",
        "mesh.py",
        "max(fitting, key=lambda i: shape[i])",
        "min(fitting, key=lambda i: shape[i])",
        "test_mesh.py::test_the_largest_axis_that_the_devices_divide_is_split",
    ),
    Mutant(
        "batch-whole-on-the-fsdp-axis",
        "mesh.py",
        'if name in ("data", "fsdp")',
        'if name == "data"',
        "test_mesh.py::test_split_parameters_train_as_on_one_device",
    ),
    Mutant(
        "only-the-first-word-of-an-array",
        "cli.py",
        "np.array([float(word) for word in words])",
        "np.array([float(word) for word in words[:1]])",
        "test_experiments.py::test_an_array_is_set_from_the_shell_with_all_its_numbers",
    ),
    Mutant(
        "traceback-for-bad-input",
        "cli.py",
        "known or _ours(error, main)",
        "known",
        "test_experiments.py::test_an_error_of_the_library_in_a_script_is_one_sentence",
    ),
)

MUTANTS = (
    *PROCESSES,
    *SOLVERS,
    *LOSSES,
    *MODELS,
    *LIKELIHOOD,
    *SAMPLING,
    *GUIDANCE,
    *CORRUPTION,
    *NETS,
    *DATA,
    *METRICS,
    *TRAINING,
    *RUNS,
    *SWEEPS,
    *CHECKS,
    *MESH_AND_CLI,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What pytest said: "noticed", "not noticed" or "error", and a word on it."""

    kind: str
    said: str
    seconds: float


def environment(folder: Path) -> dict[str, str]:
    """The variables of a run in `folder`; compiled programs are those of the suite."""
    first = [str(folder), os.environ.get("PYTHONPATH", "")]
    programs = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return programs | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, first))}


def pytest_in(folder: Path, words: list[str]) -> subprocess.CompletedProcess:
    """Run pytest in `folder`, whose package comes before the installed one."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(
        [*command, *words],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def copy_to(folder: Path) -> None:
    """Copy what the tests read into `folder`."""
    skip = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=skip)
        else:
            shutil.copy(ROOT / part, folder / part)


def run(mutant: Mutant) -> Outcome:
    """Make the mistake in a copy, and run the tests that should notice."""
    began = time.perf_counter()

    def outcome(kind, said):
        return Outcome(kind, said, time.perf_counter() - began)

    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy_to(folder)
        place = folder / mutant.place
        try:
            place.write_text(mutant.changed(place.read_text()))
            done = pytest_in(folder, [*mutant.words, "-x"])
        except ValueError as error:
            return outcome("error", str(error))
        except subprocess.TimeoutExpired:
            return outcome("error", f"the tests ran for more than {TIMEOUT} s")
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return outcome("noticed", failed[0].removeprefix("tests/"))
    if done.returncode == 0:
        return outcome("not noticed", mutant.known_gap or mutant.tests)
    last = (done.stdout + done.stderr).strip().splitlines()[-3:]
    return outcome("error", f"pytest ended with {done.returncode}: {' | '.join(last)}")


def run_unchanged(chosen: list[Mutant]) -> int:
    """Run the tests of the mutants without a mistake: all of them have to pass."""
    failures = 0
    for words in sorted({tuple(mutant.words) for mutant in chosen}):
        with tempfile.TemporaryDirectory(prefix="unchanged-") as name:
            copy_to(Path(name))
            done = pytest_in(Path(name), [*words])
        failures += done.returncode != 0
        print("passes" if done.returncode == 0 else "FAILS ", *words, flush=True)
    print(f"{failures} selections do not pass without a mistake.")
    return int(failures > 0)


def chosen_from(names: list[str]) -> list[Mutant]:
    """The mutants of these names, or all of them; an unknown name ends the script."""
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in names if name not in known]:
        sys.exit(
            f"error: there is no mutant {unknown[0]!r}; `--list` shows the "
            f"{len(known)} names."
        )
    return [known[name] for name in names] or list(MUTANTS)


def main(argv: list[str] | None = None) -> int:
    """Run the chosen mutants, say what came of each; 1 if one was not noticed."""
    parser = argparse.ArgumentParser(
        description="Make small mistakes in a copy of the package, one at a time, and "
        "say which of them the tests notice."
    )
    parser.add_argument("names", nargs="*", help="mutants to run; all by default")
    parser.add_argument("--list", action="store_true", help="name them, run nothing")
    unchanged = "run their tests without the mistakes: all have to pass"
    parser.add_argument("--unchanged", action="store_true", help=unchanged)
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time, 1")
    arguments = parser.parse_args(argv)
    chosen = chosen_from(arguments.names)
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.name:42} {mutant.place:42} {mutant.tests}")
        return 0
    if arguments.unchanged:
        return run_unchanged(chosen)
    counts = dict.fromkeys(("noticed", "not noticed", "known gap", "error"), 0)
    with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        for mutant, found in zip(chosen, pool.map(run, chosen), strict=True):
            gap = found.kind == "not noticed" and mutant.known_gap
            kind = "known gap" if gap else found.kind
            counts[kind] += 1
            seconds = f"{found.seconds:3.0f} s"
            print(f"{kind:12} {mutant.name:42} {seconds}  {found.said}", flush=True)
    said = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    print(f"{len(chosen)} mutants: {said}.")
    return int(counts["not noticed"] + counts["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
