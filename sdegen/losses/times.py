"""How training draws its times: a quantile function u in (0, 1) -> t of uniform u."""

import abc
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Int

from .._compat import renamed as _renamed
from ..processes.interpolant import AbstractInterpolant
from ..processes.path import AbstractPath
from ..typing import RandomKey, Scalar, number
from .per_sample import draw_each, sample_keys

Path: TypeAlias = AbstractPath | AbstractInterpolant
Row: TypeAlias = Float[Array, " batch"]


class AbstractTimes(eqx.Module):
    """The distribution of the training times, by its quantile function.

    **Arguments** (of every subclass):
    - `stratified`: draw one u in each of as many equal cells as there are samples, by
      one shared shift (Kingma et al. 2021, "Variational diffusion models", appendix
      I.1); default True. False draws them independently.

    **Arguments** of the methods:
    - `path`: a path, or an interpolant where t_min and t_max suffice.
    - `u`: probabilities, (batch,).
    - `key`: the key of the batch.
    - `index`, `total`: see `sdegen.losses.batch_index`.
    - `dtype`: of the times, float32 at least.
    """

    stratified: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def quantile(self, path: Path, u: Row) -> Row:
        """The times with probability u below them."""

    def draw(
        self, key: RandomKey, path: Path, index: Int[Array, "n"], total: int, dtype=None
    ) -> Row:
        """The times of the samples `index`, the same on any number of devices."""
        dtype = jnp.promote_types(dtype or jnp.result_type(float), jnp.float32)
        if self.stratified:
            u = (jax.random.uniform(key, (), dtype) + index.astype(dtype)) / total
        else:
            u = draw_each(jax.random.uniform, sample_keys(key, index), (), dtype)
        tiny = jnp.finfo(dtype).eps  # rates may be infinite at the ends
        return self.quantile(path, jnp.clip(u, tiny, 1 - tiny))


class Uniform(AbstractTimes):
    """t uniform on [t_min, t_max]."""

    stratified: bool = eqx.field(default=True, static=True)

    def quantile(self, path, u):
        """The times with probability u below them."""
        return path.t_min + (path.t_max - path.t_min) * u


class FlowTime(AbstractTimes):
    """sigma / (alpha + sigma) uniform: rectified flow's uniform times, on any path."""

    stratified: bool = eqx.field(default=True, static=True)

    def quantile(self, path, u):
        """The times with probability u below them."""
        low, high = path.flow_time(path.t_min), path.flow_time(path.t_max)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.vmap(path.inverse())(-jnp.log(low + (high - low) * u))  # pyright: ignore[reportAttributeAccessIssue]


class OfProcess(AbstractTimes):
    """The times of the process itself, `training_time`: the default of every loss.

    Uniform, but for processes whose time is the noise level, which have Karras' law.

    **Arguments:**
    - `sigma_data`: the standard deviation of the data; 0.5.
    """

    sigma_data: Scalar = number(0.5)
    stratified: bool = eqx.field(default=True, static=True)

    def quantile(self, path, u):
        """The times with probability u below them."""
        if isinstance(path, AbstractPath):
            return path.training_time(u, self.sigma_data.astype(u.dtype))
        return path.t_min + (path.t_max - path.t_min) * u


class LogitNormal(AbstractTimes):
    """logit of (t - t_min) / (t_max - t_min) normal: the middle of the path more often.

    Esser et al. 2024, "Scaling rectified flow transformers", eq. 19.

    **Arguments:**
    - `mean`, `std`: of the logit, defaults 0 and 1.
    """

    mean: Scalar = number(0.0)
    std: Scalar = number(1.0)
    stratified: bool = eqx.field(default=True, static=True)

    def quantile(self, path, u):
        """The times with probability u below them."""
        w = jax.nn.sigmoid(self.mean + self.std * ndtri(u))
        return path.t_min + (path.t_max - path.t_min) * w


class LogNormal(AbstractTimes):
    """log(sigma / alpha) normal, on any path. Karras et al. 2022, table 1.

    Draws beyond the ends of the path become the ends.

    **Arguments:**
    - `mean`, `std`: of log(sigma / alpha), defaults -1.2 and 1.2.
    """

    mean: Scalar = number(-1.2)
    std: Scalar = number(1.2)
    stratified: bool = eqx.field(default=True, static=True)

    def quantile(self, path, u):
        """The times with probability u below them."""
        log_ratio = self.mean + self.std * ndtri(u)
        return jax.vmap(path.inverse())(jax.nn.softplus(-log_ratio))  # pyright: ignore[reportAttributeAccessIssue]


class EulerTimes(AbstractTimes):
    """The times at which `steps` equal Euler steps evaluate the flow, equally often.

    **Arguments:**
    - `steps`: default 1, which is distillation: only the velocity at t_max counts (Liu
      et al. 2023, "Flow straight and fast", section 2.2).
    """

    steps: int = eqx.field(default=1, static=True)
    stratified: bool = eqx.field(default=True, static=True)

    def quantile(self, path, u):
        """The times with probability u below them."""
        node = jnp.ceil(u * self.steps) / self.steps
        return path.t_min + (path.t_max - path.t_min) * node


__getattr__ = _renamed(__name__)
