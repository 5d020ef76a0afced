"""From a recording to what would help, without torch.

1. `measured_plan` is the plan with the costs that were measured.
2. `what_if` replays the measured step with one thing changed, and ranks the gains.
3. `step_advice` says in a sentence each what stands out, with its number.
4. `again` is the command line that trains with another plan.
"""

from stagewise.diagnosis.measured_plan import MeasuredSteps, as_measured
from stagewise.diagnosis.step_advice import Hint, advice_for
from stagewise.diagnosis.what_if import Help, what_would_help

__all__ = ["Help", "Hint", "MeasuredSteps", "advice_for", "as_measured", "what_would_help"]
