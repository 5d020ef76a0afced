"""From a recording to what would help, without torch.

1. `measured_plan` is the plan with measured costs in place of predicted ones.
2. `what_if` replays the measured step with one thing changed, and ranks the gains.
3. `sharded_steps` is the predicted step, also where a mesh shards its stages.
4. `step_advice` says what stands out: one sentence each, with its number.
5. `again` writes the command line that trains with another plan.
"""

from stagewise.diagnosis.measured_plan import MeasuredSteps, as_measured
from stagewise.diagnosis.sharded_steps import PredictedStep, predicted_step
from stagewise.diagnosis.step_advice import Hint, advice_for
from stagewise.diagnosis.what_if import Help, what_would_help

__all__ = [
    "Help",
    "Hint",
    "MeasuredSteps",
    "PredictedStep",
    "advice_for",
    "as_measured",
    "predicted_step",
    "what_would_help",
]
