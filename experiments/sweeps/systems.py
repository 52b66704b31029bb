"""Process x prediction x weighting at equal cost: which of them matter, on 2-D data?

Every trial sees the same number of samples by the same network and is sampled with the
same number of evaluations; a weighting means the same objective for every prediction.
"""

from denoising import Config, System, trial

import sdegen
from sdegen import prediction, weight
from sdegen.sweeps import Static, Sweep

PROCESSES = {"vp": sdegen.VP(), "edm": sdegen.EDM(), "rf": sdegen.RectifiedFlow()}
PREDICTIONS = {
    "eps": prediction.eps,
    "x0": prediction.x0,
    "v": prediction.v,
    "velocity": prediction.velocity,
    "edm": prediction.edm,
}
WEIGHTS = {"uniform": weight.uniform, "min-snr": weight.MinSNR(), "edm": weight.edm}


sweep = Sweep(
    trial,
    {
        "system.process": Static(**PROCESSES),
        "system.prediction": Static(**PREDICTIONS),
        "system.weight": Static(**WEIGHTS),
        "optimizer.learning_rate": [1e-3, 3e-3],
        "seed": range(5),
    },
    config=Config(system=System(), optimizer=sdegen.AdamW(warmup=50)),
    metric="w2",
)
