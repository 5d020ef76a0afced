"""From a recording to what would help, without torch.

1. `measured_plan` is the plan with measured costs in place of predicted ones.
2. `what_if` replays the measured step with one thing changed, and ranks the gains.
3. `step_advice` says what stands out: one sentence each, with its number.
4. `again` writes the command line that trains with another plan.
"""

from stagewise.diagnosis.measured_plan import MeasuredSteps, as_measured
from stagewise.diagnosis.step_advice import Hint, advice_for
from stagewise.diagnosis.what_if import Help, what_would_help

__all__ = ["Help", "Hint", "MeasuredSteps", "advice_for", "as_measured", "what_would_help"]
