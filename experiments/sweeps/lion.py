"""Lion against AdamW: learning rate x weight decay x batch size x five seeds, under VP,
EDM and rectified flow, on 2-D data and on digits.

The grids are apart by a factor of about 3 in the rate and 10 in the decay, as Chen et
al. 2023 (section 5) advise, so that neither ends at the border of its own.
"""

from denoising import Config, System, trial

import sdegen
from sdegen import prediction, times
from sdegen.sweeps import Static, Sweep

SYSTEMS = Static(
    vp=System(sdegen.VP(), prediction.v),
    edm=System(sdegen.EDM(), prediction.edm, times=times.LogNormal()),
    rf=System(sdegen.RectifiedFlow(), prediction.velocity),
)


def _space(optimizer, rates, decays):
    return {
        "data": Static("ring", "digits"),
        "system": SYSTEMS,
        "optimizer": Static(**{type(optimizer).__name__.lower(): optimizer}),
        "batch_size": Static(64, 256),
        "optimizer.learning_rate": rates,
        "optimizer.weight_decay": decays,
        "seed": range(5),
    }


spaces = [
    _space(sdegen.AdamW(warmup=50), [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], [1e-2, 1e-1]),
    _space(sdegen.Lion(warmup=50), [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], [1e-1, 1.0]),
]
sweep = Sweep(trial, spaces, config=Config(), metric="w2")
